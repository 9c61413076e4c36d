// The fused linear layer at fp32 accuracy through mma.sync: fused_linear_sm80.cuh with operands split into fp16 pairs
// (operands.cuh).
#include "fused_linear_sm80.cuh"
