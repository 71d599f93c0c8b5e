// Greedy acceptance, and the argmax for processors without AVX2.

#include "spec_verify/cpu.h"

#include "spec_verify/argmax.h"

const ArgmaxTable tokenmill_argmax_plain = {{argmax_f32, argmax_f16, argmax_bf16}};

void tokenmill_greedy_accept(const GreedyProblem& problem, ArgmaxFunction argmax, int64_t begin, int64_t end) {
    const int64_t width = problem.max_spec_len + 1;
    for (int64_t request = begin; request < end; ++request) {
        const int64_t first = request == 0 ? 0 : problem.cu_num_draft_tokens[request - 1];
        const int64_t count = problem.cu_num_draft_tokens[request] - first;
        int32_t* output = problem.output_token_ids + request * width;
        int64_t written = 0;
        bool accepted = true;
        // Rows after the first mismatch are never read: at low acceptance that is most of the logits.
        while (accepted && written < count) {
            const int64_t position = first + written;
            const char* row = problem.target_logits + position * problem.row_bytes;
            const int32_t token = static_cast<int32_t>(argmax(row, problem.vocabulary));
            accepted = token == problem.draft_token_ids[position];
            output[written++] = token;
        }
        if (accepted) {
            output[written++] = problem.bonus_token_ids[request];
        }
        while (written < width) {
            output[written++] = -1;
        }
    }
}
