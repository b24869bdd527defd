"""What several test files share, each module named by what it holds."""
