"""A tick's look at the input: synchronisation of pairs of neurons, queries, attention."""
