"""Numbers beside the peers', run by `make bench`; docs/benchmarks.md is what a whole run writes."""
