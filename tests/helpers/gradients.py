"""Where gradients are kept."""

from ltp_sparse.optim.gradient_view import GradientView


def has_dense_gradient(param):
    """Whether memory of the parameter's size is held for its gradient; a view of a packed one is not."""
    return param.grad is not None and not isinstance(param.grad, GradientView)
