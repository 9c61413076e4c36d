// The fused linear layer for bf16, fp16 and tf32 on Hopper: fused_linear_sm90.cuh with operands as they are.
#include "fused_linear_sm90.cuh"
