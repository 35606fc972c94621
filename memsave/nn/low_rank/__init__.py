"""Linears as two low-rank factors, and what streams in rank space around them.

linear.py (the module), factorize.py, moments.py and ranks.py (how it is made), replacing.py and planning.py (of a
model); layout.py, attention.py, group_run.py, heads.py and latents.py (attention by groups of heads and against a cache
of latents); lazy_rows.py, rows.py and feed_forward.py (feed-forward blocks by rows).
"""
