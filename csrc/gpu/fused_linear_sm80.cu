// The fused linear layer for bf16, fp16 and tf32 on sm_80 and later: fused_linear_sm80.cuh with operands as they are.
#include "fused_linear_sm80.cuh"
