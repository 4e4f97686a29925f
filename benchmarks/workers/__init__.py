"""One measured item a module; each runs in a process of its own (see `benchmarks.protocol`)."""
