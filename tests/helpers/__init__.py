"""Helpers of several test files, in modules named by their content."""
