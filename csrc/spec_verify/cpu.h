// What each instruction set provides for greedy acceptance, and the acceptance loop that uses it.
#pragma once

#include "spec_verify/greedy.h"

// (row, n) -> index of the largest value, as argmax.h defines it; n >= 1.
using ArgmaxFunction = int64_t (*)(const void* row, int64_t n);

struct ArgmaxTable {
    ArgmaxFunction of_type[3];  // by LogitsType
};

extern const ArgmaxTable tokenmill_argmax_plain;
extern const ArgmaxTable tokenmill_argmax_avx2;
extern const ArgmaxTable tokenmill_argmax_avx512;

// Requests begin..end of the batch; requests are independent, so threads take ranges of them.
void tokenmill_greedy_accept(const GreedyProblem& problem, ArgmaxFunction argmax, int64_t begin, int64_t end);
