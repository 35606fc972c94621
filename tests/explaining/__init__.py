"""Tests of memsave/explaining/."""
