"""What turns stored runs into tables, plots and reports, and the benchmarks."""
