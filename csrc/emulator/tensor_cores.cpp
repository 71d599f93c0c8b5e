// ldmatrix, stmatrix and mma.sync. Accumulation is float32 in order of k: the hardware's order and its truncations differ.
#include "tensor_cores.h"

#include "arithmetic.h"
#include "race.h"
#include "report.h"

namespace emulator {
namespace {
struct E4m3Table {
    float value[256];
    E4m3Table() {
        for (u32 i = 0; i < 256; i++) value[i] = from_e4m3(i);
    }
};
const E4m3Table e4m3;

struct MatrixArgument {
    u32* registers;
    int matrices;
    bool transposed;
    u32 address;
};
// Row `row` of matrix q lies at lane 8q + row's address; element (i, j) in half j % 2 of lane 4i + j / 2's register q.
void move_matrices(Warp& warp, Rendezvous& r, bool is_store) {
    const MatrixArgument& first = *static_cast<MatrixArgument*>(r.arguments[0]);
    for (int q = 0; q < first.matrices; q++)
        for (int row = 0; row < 8; row++) {
            const int source = q * 8 + row;
            const MatrixArgument& owner = *static_cast<MatrixArgument*>(r.arguments[source]);
            Thread* executing = current;
            current = &warp.lane(source);
            char* p = shared_pointer(owner.address, 16, 16, is_store ? "stmatrix" : "ldmatrix", r.pc);
            if (p) access(p, 16, is_store ? is_write : plain_read, *current, current->epoch(), r.pc);
            current = executing;
            uint16_t values[8];
            if (p && !is_store) memcpy(values, p, 16);
            else memset(values, 0xff, 16);
            for (int column = 0; column < 8; column++) {
                const int i = owner.transposed ? column : row, j = owner.transposed ? row : column;
                u32& reg = static_cast<MatrixArgument*>(r.arguments[i * 4 + j / 2])->registers[q];
                const int shift = (j & 1) * 16;
                if (is_store) values[column] = (uint16_t)(reg >> shift);
                else reg = (reg & ~(0xffffu << shift)) | (u32)values[column] << shift;
            }
            if (p && is_store) memcpy(p, values, 16);
        }
}

struct MmaArgument {
    Operand type;
    void* d;
    const u32 *a, *b;
};

template <class Accumulator>
void do_mma(Rendezvous& r, Operand type) {
    const int per_register = 4 / operand_bytes(type), k = operand_k(type);
    const u32* a_registers[32];
    float a[16][32], b[32][8];
    Accumulator d[16][8];
    for (int l = 0; l < 32; l++) {
        const MmaArgument& m = *static_cast<MmaArgument*>(r.arguments[l]);
        const int g = l / 4, t = l % 4;
        a_registers[l] = m.a;
        for (int i = 0; i < 4; i++) d[g + (i >> 1) * 8][t * 2 + (i & 1)] = static_cast<Accumulator*>(m.d)[i];
        for (int i = 0; i < 2; i++) {
            float values[4];
            decode(type, &m.b[i], per_register, values);
            for (int e = 0; e < per_register; e++) b[i * k / 2 + t * per_register + e][g] = values[e];
        }
    }
    decode_a_fragment(type, a_registers, a);
    multiply_add(&d[0][0], a, &b[0][0], k, 8);
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            static_cast<Accumulator*>(static_cast<MmaArgument*>(r.arguments[l])->d)[i] = d[l / 4 + (i >> 1) * 8][l % 4 * 2 + (i & 1)];
}
}  // namespace

void decode(Operand type, const void* elements, int count, float* values) {
    const uint8_t* bytes = static_cast<const uint8_t*>(elements);
    for (int i = 0; i < count; i++) {
        switch (type) {
            case Operand::bf16: values[i] = bf2f((u32)(bytes[2 * i] | bytes[2 * i + 1] << 8)); break;
            case Operand::f16: values[i] = h2f((u32)(bytes[2 * i] | bytes[2 * i + 1] << 8)); break;
            case Operand::e4m3: values[i] = e4m3.value[bytes[i]]; break;
            case Operand::s8: values[i] = (float)(int8_t)bytes[i]; break;
        }
    }
}

void decode_a_fragment(Operand type, const u32* const registers[32], float a[16][32]) {
    const int per_register = 4 / operand_bytes(type), k = operand_k(type);
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            decode(type, &registers[l][i], per_register, &a[l / 4 + (i & 1) * 8][(i >> 1) * k / 2 + l % 4 * per_register]);
}

void multiply_add(float* d, const float a[16][32], const float* b, int k, int n) {
    for (int i = 0; i < 16; i++)
        for (int p = 0; p < k; p++) {
            const float x = a[i][p];
            for (int j = 0; j < n; j++) d[i * n + j] += x * b[p * n + j];
        }
}

void multiply_add(int* d, const float a[16][32], const float* b, int k, int n) {
    for (int i = 0; i < 16; i++)
        for (int p = 0; p < k; p++) {
            const int x = (int)a[i][p];
            for (int j = 0; j < n; j++) d[i * n + j] += x * (int)b[p * n + j];
        }
}

void load_matrix(u32* registers, int matrices, bool transposed, u32 address) {
    MatrixArgument a{registers, matrices, transposed, address};
    collective(load_operation * 16 + matrices * 2 + transposed, "ldmatrix", ~0u, &a,
               [](Warp& w, Rendezvous& r) { move_matrices(w, r, false); }, EMULATOR_PC);
}

void store_matrix(const u32* registers, int matrices, bool transposed, u32 address) {
    MatrixArgument a{const_cast<u32*>(registers), matrices, transposed, address};
    collective(store_operation * 16 + matrices * 2 + transposed, "stmatrix", ~0u, &a,
               [](Warp& w, Rendezvous& r) { move_matrices(w, r, true); }, EMULATOR_PC);
}

void mma(Operand type, void* d, const u32* a, const u32* b) {
    MmaArgument m{type, d, a, b};
    collective(mma_operation * 16 + (int)type, "mma.sync", ~0u, &m, [](Warp&, Rendezvous& r) {
        const Operand of = static_cast<MmaArgument*>(r.arguments[0])->type;
        if (of == Operand::s8) do_mma<int>(r, of);
        else do_mma<float>(r, of);
    }, EMULATOR_PC);
}
}  // namespace emulator
