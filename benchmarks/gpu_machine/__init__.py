"""What the packages for a borrowed GPU machine share: batches of files, records, processes, clocks, weights."""
