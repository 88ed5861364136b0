"""Beyond one machine: bundles for the servers that clusters run."""
