// The fused linear layer at fp32 accuracy on Hopper: fused_linear_sm90.cuh with operands split into fp16 pairs
// (operands.cuh).
#include "fused_linear_sm90.cuh"
