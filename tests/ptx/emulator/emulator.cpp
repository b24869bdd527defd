// The emulator's functions for Python (gpu.py) and for its CUDA runtime (cudart.cpp).
#include <cstring>

#include "machine.h"

namespace {

std::vector<Module>& modules() {
    static std::vector<Module> all;
    return all;
}

std::string error, text;

const char* told(const std::string& message) {
    text = message;
    return text.c_str();
}

std::string quoted(const std::string& raw) {
    std::string result = "\"";
    for (char c : raw) {
        if (c == '"' || c == '\\') result += '\\';
        result += c;
    }
    return result + '"';
}

template <class F>
int guarded(F f) {
    try {
        return f();
    } catch (const std::exception& e) {
        error = e.what();
        return -1;
    }
}

}  // namespace

extern "C" {

const char* ptx_error() { return error.c_str(); }

void ptx_configure(const Config* given) { config = *given; }

// Returns the number of the module, or -1.
int ptx_load(const char* source) {
    return guarded([&] {
        modules().push_back(parse_ptx(source));
        return int(modules().size()) - 1;
    });
}

// Forgets the last module.
void ptx_unload() { modules().pop_back(); }

// The kernel of that name, or its only one (null), of a module, or of the last module for the architecture (-1).
Kernel* ptx_kernel(int module, const char* name) {
    if (module >= 0) {
        std::map<std::string, Kernel>& kernels = modules()[module].kernels;
        const auto found = name ? kernels.find(name) : kernels.begin();
        return found == kernels.end() ? nullptr : &found->second;
    }
    const std::string target = "sm_" + std::to_string(config.sm);
    for (auto m = modules().rbegin(); m != modules().rend(); ++m) {
        const auto found = m->kernels.find(name);
        if (m->target == target && found != m->kernels.end()) return &found->second;
    }
    return nullptr;
}

// values: where each parameter is.
int ptx_launch(Kernel* kernel, const u32* grid, const u32* block, u32 dynamic_shared, const void* const* values) {
    return guarded([&] {
        std::vector<u8> params(kernel->param_bytes);
        for (size_t i = 0; i < kernel->params.size(); ++i) {
            memcpy(&params[kernel->params[i].offset], values[i], kernel->params[i].size);
        }
        launch(*kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared, std::move(params));
        return 0;
    });
}

int ptx_parameters(const Kernel* kernel) { return int(kernel->params.size()); }

int ptx_opt_in(Kernel* kernel, int bytes) {
    if (int(kernel->static_shared) + bytes > config.shared) return -1;
    kernel->dynamic_limit = u32(bytes);
    return 0;
}

int ptx_attribute_processors() { return config.processors; }
int ptx_attribute_shared() { return config.shared; }
int ptx_attribute_sm() { return config.sm; }

// JSON: {report: [count, the first in full]}
const char* ptx_reports() {
    std::string json;
    for (const auto& [what, r] : reports()) {
        json += (json.empty() ? "" : ",") + quoted(what) + ":[" + std::to_string(r.count) + "," + quoted(r.first) + "]";
    }
    return told("{" + json + "}");
}

// JSON: {kernel: {what: number}}
const char* ptx_statistics() {
    std::string json;
    for (const auto& [kernel, s] : statistics()) {
        const std::pair<const char*, u64> facts[] = {
            {"launches", s.launches},         {"blocks", s.blocks},
            {"threads", s.threads},           {"warp_instructions", s.warp_instructions},
            {"sectors_read", s.sectors_read}, {"sectors_written", s.sectors_written},
            {"sectors", s.sectors},           {"requests", s.requests},
            {"wavefronts", s.wavefronts},     {"fewest_wavefronts", s.fewest_wavefronts},
            {"shared_bytes", s.shared},
        };
        std::string fields;
        for (const auto& [name, value] : facts) {
            fields += (fields.empty() ? "" : ",") + quoted(name) + ":" + std::to_string(value);
        }
        json += (json.empty() ? "" : ",") + quoted(kernel) + ":{" + fields + "}";
    }
    return told("{" + json + "}");
}

// JSON: {target: {kernel of CUDA: [instructions that ran at least once, all]}}
const char* ptx_coverage() {
    std::map<std::string, std::string> targets;
    for (const Module& m : modules()) {
        for (const auto& [name, k] : m.kernels) {
            u64 ran = 0;
            for (const Instruction& in : k.code) ran += in.ran > 0;
            std::string& json = targets[m.target];
            json += (json.empty() ? "" : ",") + quoted(name) + ":[" + std::to_string(ran) + "," +
                    std::to_string(k.code.size() - 1) + "]";
        }
    }
    std::string json;
    for (const auto& [target, kernels] : targets) {
        json += (json.empty() ? "" : ",") + quoted(target) + ":{" + kernels + "}";
    }
    return told("{" + json + "}");
}

void ptx_clear() {
    reports().clear();
    statistics().clear();
}

}  // extern "C"
