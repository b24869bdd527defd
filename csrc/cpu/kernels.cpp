#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ltp {

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

std::atomic<const Kernels*> chosen{nullptr};

#if defined(__x86_64__)
bool runs_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vpopcntdq");
}
#endif

const Kernels* newest() {
#if defined(__x86_64__)
    if (runs_avx512()) return &kernels_avx512;
    if (runs_avx2()) return &kernels_avx2;
#endif
    return &kernels_generic;
}

const Kernels* find(const std::string& name) {
    if (name == "generic") return &kernels_generic;
#if defined(__x86_64__)
    if (name == "avx2" && runs_avx2()) return &kernels_avx2;
    if (name == "avx512" && runs_avx512()) return &kernels_avx512;
#endif
    if (name == "avx2" || name == "avx512") {
        throw std::invalid_argument("ltp_sparse._C: this machine cannot run the " + name + " kernels; use " +
                                    newest()->name);
    }
    throw std::invalid_argument("ltp_sparse._C: instruction set must be generic, avx2 or avx512, got " + name);
}

}  // namespace

const Kernels& kernels() {
    const Kernels* current = chosen.load();
    if (current == nullptr) {
        const char* asked = std::getenv("LTP_SPARSE_ISA");
        current = asked != nullptr && *asked != '\0' ? find(asked) : newest();
        chosen.store(current);
    }
    return *current;
}

void use_isa(const std::string& name) { chosen.store(find(name)); }

}  // namespace ltp
