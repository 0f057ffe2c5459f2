"""mixattn beside the other CPU engines: one workload, one machine, one run (see README.md here)."""
