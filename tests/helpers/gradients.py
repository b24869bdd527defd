"""Checks of where gradients are kept."""

from ltp_sparse.optim.gradient_view import GradientView


def has_dense_gradient(param):
    """Whether the gradient of a parameter has memory of its size, unlike a view of a packed one."""
    return param.grad is not None and not isinstance(param.grad, GradientView)
