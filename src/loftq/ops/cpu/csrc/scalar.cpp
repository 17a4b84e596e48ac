#include "numbers.h"
#include "isa_scalar.h"
#include "product.h"
#include "attend.h"
#include "dequantize.h"
#include "rounding.h"
#include "table.h"

const Kernels* scalar_kernels() { return &KERNELS; }
