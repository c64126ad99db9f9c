"""CPU kernels: a micro-kernel generator on LLVM, and oneDNN."""
