"""Tests of what imports other packages."""
