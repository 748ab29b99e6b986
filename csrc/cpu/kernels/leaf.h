// What every leaf file ends with: the table of its kernels, named after the instruction set that
// this build of the file is for.
#pragma once

#define RLKERN_JOIN_(a, b) a##b
#define RLKERN_JOIN(a, b) RLKERN_JOIN_(a, b)
#define RLKERN_STRING_(a) #a
#define RLKERN_STRING(a) RLKERN_STRING_(a)

#define RLKERN_LEAF(table) RLKERN_JOIN(table##_, RLKERN_ISA)
#define RLKERN_ISA_NAME RLKERN_STRING(RLKERN_ISA)
