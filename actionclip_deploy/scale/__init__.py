"""Beyond one machine: many videos to tables of results, on this machine or a cluster."""
