"""Scripts to copy, and the modules of benchmarks and testbeds."""
