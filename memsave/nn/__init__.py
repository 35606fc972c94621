"""The modules that memsave puts in place of others: one Linear, norms, and the notes that connect them."""
