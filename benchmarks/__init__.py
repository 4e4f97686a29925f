"""Refluence next to its peers and to the limits of the machine: `make bench` writes docs/benchmarks.md."""
