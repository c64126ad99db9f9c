"""Plan, candidates, measurements, decisions: what finds the fastest config for every GEMM and token count."""
