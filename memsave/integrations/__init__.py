"""What knows other packages by name: the only files that import them."""
