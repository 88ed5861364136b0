"""The Open Inference Protocol over gRPC: the functions that HTTP calls, behind the same limits."""
