#include <algorithm>
#include <cctype>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "ptx.h"

int width_of(Type type) {
    static const int kBytes[] = {0, 1, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 4, 4};
    return kBytes[type];
}

namespace {

template <class T>
using Names = std::map<std::string, T>;

// clang-format off
const Names<Type> kTypes = {
    {"pred", PRED}, {"b8", B8}, {"b16", B16}, {"b32", B32}, {"b64", B64}, {"u8", U8}, {"u16", U16}, {"u32", U32},
    {"u64", U64}, {"s8", S8}, {"s16", S16}, {"s32", S32}, {"s64", S64}, {"f16", F16}, {"bf16", BF16}, {"f32", F32},
    {"f64", F64}, {"f16x2", F16X2}, {"bf16x2", BF16X2}};
const Names<Opcode> kOpcodes = {
#define X(name) {#name, OP_##name},
    LTP_PTX_OPCODES(X)
#undef X
    {"barrier", OP_bar}, {"exit", OP_ret}, {"membar", OP_fence}, {"ldu", OP_ld}};
const Names<Compare> kCompares = {
    {"eq", EQ}, {"ne", NE}, {"lt", LT}, {"le", LE}, {"gt", GT}, {"ge", GE}, {"lo", LT}, {"ls", LE}, {"hi", GT}, {"hs", GE},
    {"equ", EQU}, {"neu", NEU}, {"ltu", LTU}, {"leu", LEU}, {"gtu", GTU}, {"geu", GEU}, {"num", NUM}, {"nan", NAN_}};
const Names<u32> kSpecials = {
    {"%tid.x", TID_X}, {"%tid.y", TID_Y}, {"%tid.z", TID_Z}, {"%ntid.x", NTID_X}, {"%ntid.y", NTID_Y},
    {"%ntid.z", NTID_Z}, {"%ctaid.x", CTAID_X}, {"%ctaid.y", CTAID_Y}, {"%ctaid.z", CTAID_Z}, {"%nctaid.x", NCTAID_X},
    {"%nctaid.y", NCTAID_Y}, {"%nctaid.z", NCTAID_Z}, {"%laneid", LANEID}, {"%warpid", WARPID},
    {"%lanemask_lt", LANEMASK_LT}, {"%lanemask_le", LANEMASK_LE}, {"%lanemask_gt", LANEMASK_GT},
    {"%lanemask_ge", LANEMASK_GE}, {"%lanemask_eq", LANEMASK_EQ}};
const Names<Rounding> kRoundings = {
    {"rn", R_RN}, {"rz", R_RZ}, {"rm", R_RM}, {"rp", R_RP}, {"rni", R_RNI}, {"rzi", R_RZI}, {"rmi", R_RMI}, {"rpi", R_RPI}};
const Names<Part> kParts = {{"lo", LOW}, {"hi", HIGH}, {"wide", WIDE}};
const Names<Space> kSpaces = {{"global", GLOBAL}, {"shared", SHARED}, {"param", PARAM}};
const Names<AtomicOp> kAtomics = {
    {"add", A_ADD}, {"inc", A_INC}, {"or", A_OR}, {"and", A_AND}, {"xor", A_XOR}, {"min", A_MIN}, {"max", A_MAX},
    {"exch", A_EXCH}, {"cas", A_CAS}};
const Names<Mode> kModes = {
    {"up", UP}, {"down", DOWN}, {"bfly", BUTTERFLY}, {"idx", INDEX}, {"all", ALL}, {"any", ANY}, {"ballot", BALLOT}};
const Names<u8> kVectors = {{"v2", 2}, {"v4", 4}, {"v8", 8}};
// What makes no difference here: hints for caches, and that a branch or barrier is the same for all threads of a warp.
const std::set<std::string> kIgnored = {
    "uni", "sync", "aligned", "weak", "evict_last", "evict_first", "evict_normal", "no_allocate", "cg", "ca", "cs", "cv",
    "wb", "wt"};
// clang-format on

// The value of a name in a table, or null.
template <class T>
const T* found(const Names<T>& names, const std::string& name) {
    const auto at = names.find(name);
    return at == names.end() ? nullptr : &at->second;
}

std::string trim(const std::string& text) {
    const size_t from = text.find_first_not_of(" \t\r\n"), to = text.find_last_not_of(" \t\r\n");
    return from == std::string::npos ? "" : text.substr(from, to - from + 1);
}

std::vector<std::string> words(const std::string& text) {
    std::istringstream in(text);
    std::vector<std::string> found;
    for (std::string word; in >> word;) found.push_back(word);
    return found;
}

// At the separators that no bracket encloses.
std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> found(1);
    int depth = 0;
    for (char c : text) {
        depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
        if (c == separator && depth == 0) {
            found.emplace_back();
        } else {
            found.back() += c;
        }
    }
    if (trim(found.back()).empty()) found.pop_back();
    return found;
}

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

u32 round_up(u32 n, u32 to) { return (n + to - 1) / to * to; }

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("PTX: " + what); }

struct Variable {
    std::string name;
    u32 bytes = 0, align = 0;
};

// ".align 16 .b8 name[count]", ".u64 name", ".param .u64 .ptr .global .align 1 name"
Variable variable(const std::string& text) {
    static const std::set<std::string> kQualifiers = {".global", ".shared", ".param", ".extern", ".visible", ".weak"};
    Variable v;
    Type type = NONE;
    const std::vector<std::string> parts = words(text);
    for (size_t i = 0; i < parts.size(); ++i) {
        if (parts[i] == ".align") {
            v.align = u32(std::stoul(parts[++i]));
        } else if (parts[i] == ".ptr") {  // what follows is about what it points to
            if (i + 1 < parts.size() && kQualifiers.count(parts[i + 1])) ++i;
            if (i + 1 < parts.size() && parts[i + 1] == ".align") i += 2;
        } else if (parts[i][0] != '.') {
            v.name = parts[i];
        } else if (!kQualifiers.count(parts[i])) {
            const Type* known = found(kTypes, parts[i].substr(1));
            if (known == nullptr) fail("variable: " + text);
            type = *known;
        }
    }
    u32 count = 1;
    const size_t bracket = v.name.find('[');
    if (bracket != std::string::npos) {
        const std::string number = v.name.substr(bracket + 1, v.name.find(']') - bracket - 1);
        count = number.empty() ? 0 : u32(std::stoul(number));
        v.name.resize(bracket);
    }
    v.bytes = count * u32(width_of(type));
    if (v.align == 0) v.align = u32(width_of(type));
    return v;
}

bool number(const std::string& text, u64& value) {
    if (text.size() > 2 && text[0] == '0' && std::string("fFdD").find(text[1]) != std::string::npos) {
        value = std::stoull(text.substr(2), nullptr, 16);  // the bits of a float or double
        return true;
    }
    const bool negative = text[0] == '-';
    const std::string digits = trim(negative || text[0] == '+' ? text.substr(1) : text);
    if (digits.empty() || !isdigit(u8(digits[0]))) return false;
    value = std::stoull(digits, nullptr, 0);
    if (negative) value = 0 - value;
    return true;
}

struct Function {
    std::vector<std::string> variables;  // results, then arguments
    size_t body = 0;
};

class Parser {
  public:
    explicit Parser(const std::string& text) { read_lines(text); }

    Module parse() {
        std::vector<std::pair<size_t, std::string>> entries;  // where they begin, behind their names
        size_t at = 0;
        while ((at = source_.find_first_not_of(" \t\r\n;", at)) != std::string::npos) {
            const size_t stop = source_.find_first_of(";{", at);
            const std::string head = source_.substr(at, stop - at);
            const bool body = stop != std::string::npos && source_[stop] == '{';
            if (head.find(".entry") != std::string::npos) {
                const size_t name = head.find(".entry") + 6, end = std::min(head.find('('), head.size());
                entries.emplace_back(at + end, trim(head.substr(name, end - name)));
            } else if (head.find(".func") != std::string::npos) {
                if (body) add_function(head.substr(head.find(".func") + 5), stop + 1);
            } else {
                module_statement(trim(head));
            }
            at = body ? behind_brace(stop) : stop;
        }
        for (const auto& [begin, name] : entries) entry(name, begin);
        return std::move(module_);
    }

  private:
    // Takes comments, debug information and the directives of the file out; lines keep their numbers.
    void read_lines(const std::string& text) {
        std::istringstream in(text);
        for (std::string line; std::getline(in, line); source_ += '\n') {
            line.resize(std::min(line.size(), line.find("//")));
            const std::string code = trim(line);
            if (starts_with(code, ".section")) break;
            if (starts_with(code, ".target")) {
                module_.target = trim(code.substr(7, code.find(',') - 7));
            } else if (!starts_with(code, ".loc") && !starts_with(code, ".file") && !starts_with(code, ".version") &&
                       !starts_with(code, ".address_size")) {
                source_ += line;
            }
        }
    }

    void module_statement(const std::string& text) {
        const bool shared = text.find(".shared") != std::string::npos;
        if (shared && text.find(".extern") != std::string::npos) {
            dynamic_ = variable(text);
        } else if (shared) {
            module_shared_.push_back(variable(text));
        } else if (text.find(".global") == std::string::npos && text.find(".const") == std::string::npos) {
            fail("module statement: " + text.substr(0, 200));
        }  // of the others, debug information; an instruction that named one would fail
    }

    // "(.param .b64 result) name (.param .b64 argument, ...)"; body: behind its brace
    void add_function(const std::string& head, size_t body) {
        const auto variables = [&](size_t open) {
            std::vector<std::string> names;
            const size_t close = head.find(')', open);
            for (const std::string& one : split(head.substr(open + 1, close - open - 1), ',')) {
                names.push_back(variable(one).name);
            }
            return names;
        };
        Function f;
        size_t name = head.find_first_not_of(" \t\r\n");
        if (head[name] == '(') {
            f.variables = variables(name);
            name = head.find(')') + 1;
        }
        const size_t open = head.find('(', name);
        for (const std::string& one : variables(open)) f.variables.push_back(one);
        f.body = body;
        functions_[trim(head.substr(name, open - name))] = f;
    }

    size_t behind_brace(size_t open) const {
        int depth = 0;
        for (size_t at = open; at < source_.size(); ++at) {
            depth += (source_[at] == '{') - (source_[at] == '}');
            if (depth == 0) return at + 1;
        }
        fail("a brace without an end");
    }

    void entry(const std::string& name, size_t at) {
        kernel_ = Kernel();
        kernel_.name = name;
        params_.clear();
        if (source_[at] == '(') {
            const size_t close = source_.find(')', at);
            for (const std::string& one : split(source_.substr(at + 1, close - at - 1), ',')) {
                const Variable v = variable(one);
                const u32 offset = round_up(kernel_.param_bytes, v.align);
                kernel_.params.push_back({v.name, offset, v.bytes, v.align});
                kernel_.param_bytes = offset + v.bytes;
                params_[v.name] = offset;
            }
            at = close + 1;
        }
        const size_t open = source_.find('{', at);
        const std::vector<std::string> directives = words(source_.substr(at, open - at));
        for (size_t i = 0; i + 1 < directives.size(); ++i) {
            if (directives[i] == ".maxntid") kernel_.max_threads = u32(std::stoul(directives[i + 1]));
            if (directives[i] == ".reqntid") kernel_.exact_threads = u32(std::stoul(directives[i + 1]));
        }
        // The dynamic shared variable stands behind the static ones, whose size is known after the body: read twice.
        const Kernel before = kernel_;
        for (int round = 0; round < 2; ++round) {
            const u32 dynamic_base = kernel_.dynamic_base;
            kernel_ = before;
            shared_.clear();
            shared_[dynamic_.name] = dynamic_base;
            for (const Variable& v : module_shared_) add_shared(v);
            body(open + 1);
            kernel_.dynamic_base = round_up(kernel_.static_shared, std::max(dynamic_.align, 1u));
        }
        if (kernel_.code.size() > 0xFFFF) fail(name + " has more instructions than accesses can name");
        module_.kernels[name] = kernel_;
    }

    void add_shared(const Variable& v) {
        shared_[v.name] = round_up(kernel_.static_shared, v.align);
        kernel_.static_shared = shared_[v.name] + v.bytes;
    }

    void body(size_t at) {  // at: behind its brace
        scopes_.assign(1, {});
        labels_.clear();
        jumps_.clear();
        call_registers_.clear();
        statements(at);
        for (const auto& [place, label] : jumps_) {
            const s32* target = found(labels_, label);
            if (target == nullptr) fail("label " + label);
            kernel_.code[place].target = *target;
        }
        Instruction end;
        end.op = OP_ret;
        end.text = "ret (end)";
        kernel_.code.push_back(end);
    }

    // Up to the brace that ends the last scope.
    void statements(size_t at) {
        const size_t outer = scopes_.size();
        std::string statement;
        int vectors = 0;  // braces open that belong to a statement
        u32 first_line = 0, line = 1 + u32(std::count(source_.begin(), source_.begin() + at, '\n'));
        for (; scopes_.size() >= outer; ++at) {
            if (at >= source_.size()) fail("no end of the body of " + kernel_.name);
            const char c = source_[at];
            line += c == '\n';
            const bool empty = trim(statement).empty();
            if (c == '{' && empty) {
                scopes_.emplace_back();
                continue;
            }
            if (c == '}' && vectors == 0) {
                if (!empty) fail("a statement without an end: " + statement);
                scopes_.pop_back();
                continue;
            }
            if (c == ':' && words(statement).size() == 1 && source_[at + 1] != ':' &&
                statement.find('.') == std::string::npos) {
                labels_[inside_ + trim(statement)] = s32(kernel_.code.size());
                statement.clear();
                continue;
            }
            if (c == ';') {
                if (!empty) body_statement(trim(statement), first_line);
                statement.clear();
                continue;
            }
            vectors += (c == '{') - (c == '}');
            if (empty && !isspace(u8(c))) first_line = line;
            statement += c;
        }
    }

    // "(result), function, (argument, ...)": its body stands in the place of the call, on registers of its own.
    void inline_call(const std::string& text) {
        std::vector<std::string> given;
        std::string name;
        for (const std::string& part : split(text, ',')) {
            const std::string one = trim(part);
            if (one[0] != '(') {
                name = one;
                continue;
            }
            for (const std::string& variable : split(one.substr(1, one.size() - 2), ','))
                given.push_back(trim(variable));
        }
        const Function* function = found(functions_, name);
        if (function == nullptr || function->variables.size() != given.size()) fail("call of " + text);
        Names<u32> aliases;
        for (size_t i = 0; i < given.size(); ++i) {
            if (!find_register(given[i], aliases[function->variables[i]])) fail("call with " + given[i]);
        }
        const std::string outside = inside_;
        inside_ = "call " + std::to_string(kernel_.code.size()) + ": ";
        if (outside.size() > 0) fail("a call inside of " + name);
        scopes_.push_back(aliases);
        statements(function->body);
        labels_[inside_ + "end"] = s32(kernel_.code.size());
        inside_ = outside;
    }

    void body_statement(const std::string& text, u32 line) {
        if (starts_with(text, ".reg")) {
            declare_registers(text.substr(4));
        } else if (starts_with(text, ".param")) {  // of a call: a register serves
            call_registers_.insert(u32(kernel_.register_bytes.size()));
            declare_registers(text.substr(6));
        } else if (starts_with(text, "call")) {
            inline_call(text.substr(text.find_first_of(" \t\r\n")));
        } else if (starts_with(text, ".shared")) {
            add_shared(variable(text));
        } else if (text[0] != '.') {
            instruction(text, line);
        } else if (!starts_with(text, ".pragma")) {
            fail("directive " + text);
        }
    }

    void declare_registers(const std::string& text) {  // " .b32 %r<100>, %x"
        const std::string first = words(text)[0];
        const Type* type = found(kTypes, first.substr(1));
        if (type == nullptr) fail("registers of type " + first);
        for (const std::string& one : split(text.substr(text.find(first) + first.size()), ',')) {
            const std::string name = trim(one);
            const size_t bracket = name.find('<');
            if (bracket == std::string::npos) {
                add_register(name, *type);
                continue;
            }
            const u32 count = u32(std::stoul(name.substr(bracket + 1)));
            for (u32 i = 0; i < count; ++i) add_register(name.substr(0, bracket) + std::to_string(i), *type);
        }
    }

    void add_register(const std::string& name, Type type) {
        scopes_.back()[name] = u32(kernel_.register_bytes.size());
        kernel_.register_bytes.push_back(u8(width_of(type)));
    }

    bool find_register(const std::string& name, u32& number) const {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            if (const u32* known = found(*scope, name)) {
                number = *known;
                return true;
            }
        }
        return false;
    }

    Operand operand(const std::string& raw) const {
        std::string text = trim(raw);
        Operand o;
        u64 offset = 0;
        const bool address = text[0] == '[';
        if (address) {
            text = trim(text.substr(1, text.rfind(']') - 1));
            const size_t sign = text.find_first_of("+-", 1);
            if (sign != std::string::npos) {
                if (!number(trim(text.substr(sign + 1)), offset)) fail("offset " + raw);
                if (text[sign] == '-') offset = 0 - offset;
                text = trim(text.substr(0, sign));
            }
        }
        o.imm = offset;
        if (text == "_") {
            o.kind = SINK;
        } else if (find_register(text, o.reg)) {
            o.kind = REGISTER;
        } else if (const u32* special = found(kSpecials, text)) {
            o.kind = SPECIAL;
            o.reg = *special;
        } else {
            o.kind = IMMEDIATE;
            const u32* variable = found(shared_, text);
            if (variable == nullptr) variable = found(params_, text);
            if (variable != nullptr) {
                o.imm = *variable + offset;
            } else if (number(text, o.imm)) {
                o.imm += offset;
            } else {
                fail("operand '" + raw + "'");
            }
        }
        return o;
    }

    void instruction(std::string text, u32 line) {
        Instruction in;
        in.line = line;
        for (char& c : text) c = isspace(u8(c)) ? ' ' : c;
        in.text = text;
        if (text[0] == '@') {
            const size_t end = text.find(' ');
            in.negated = text[1] == '!';
            u32 predicate;
            if (!find_register(text.substr(1 + in.negated, end - 1 - in.negated), predicate))
                fail("predicate: " + text);
            in.predicate = s32(predicate);
            text = trim(text.substr(end));
        }
        const size_t end = std::min(text.find(' '), text.size());
        opcode(in, split(text.substr(0, end), '.'));
        const std::vector<std::string> operands = split(text.substr(end), ',');
        const bool returns = in.op == OP_ret && !inside_.empty();
        if (in.op == OP_bra || returns) {
            jumps_.emplace_back(kernel_.code.size(), inside_ + (returns ? "end" : trim(operands[0])));
            in.op = OP_bra;
        } else {
            for (size_t i = 0; i < operands.size(); ++i) add_operand(in, trim(operands[i]), i);
        }
        if (in.space == PARAM) {
            const Operand& variable = in.operands[in.op == OP_st ? 0 : 1];
            if (variable.kind == REGISTER && call_registers_.count(variable.reg)) {
                const bool whole = variable.imm == 0 && kernel_.register_bytes[variable.reg] == width_of(in.type);
                if (!whole) fail("part of an argument: " + in.text);
                in.op = OP_mov;
            } else if (in.op == OP_st) {
                fail("parameters are not written: " + in.text);
            }
        }
        kernel_.code.push_back(in);
    }

    void add_operand(Instruction& in, const std::string& text, size_t place) const {
        if (text[0] == '{') {
            in.vector_at = u8(place);
            for (const std::string& one : split(text.substr(1, text.rfind('}') - 1), ',')) {
                in.members.push_back(operand(one));
            }
            in.operands.emplace_back();
            if (in.members.size() == 1) {
                in.operands.back() = in.members[0];
                in.members.clear();
            }
            return;
        }
        const size_t bar = place == 0 ? text.find('|') : std::string::npos;
        if (bar != std::string::npos) in.second = operand(text.substr(bar + 1));
        in.operands.push_back(operand(text.substr(0, bar)));
    }

    void opcode(Instruction& in, const std::vector<std::string>& parts) const {
        const Opcode* op = found(kOpcodes, parts[0]);
        if (op == nullptr) fail("unknown instruction: " + in.text);
        in.op = *op;
        in.strong = in.op == OP_atom || in.op == OP_red;
        in.acquires = in.releases = in.op == OP_fence;
        in.sequential = parts[0] == "membar";
        for (size_t i = 1; i < parts.size(); ++i) {
            if (!modifier(in, parts[i])) fail("modifier ." + parts[i] + ": " + in.text);
        }
        check_type(in);
    }

    static bool modifier(Instruction& in, const std::string& name) {
        const bool atomic = in.op == OP_atom || in.op == OP_red || in.op == OP_redux;
        if (const Type* type = found(kTypes, name)) {
            (in.type == NONE ? in.type : in.from) = *type;
        } else if (const Compare* compare = in.op == OP_setp ? found(kCompares, name) : nullptr) {
            in.compare = *compare;
        } else if (const AtomicOp* op = atomic ? found(kAtomics, name) : nullptr) {
            in.atomic = *op;
        } else if (const Mode* mode = in.op == OP_shfl || in.op == OP_vote ? found(kModes, name) : nullptr) {
            in.mode = *mode;
        } else if (in.op == OP_bar && name == "warp") {
            in.mode = WARP;
        } else if (in.op == OP_ldmatrix && (name == "x1" || name == "x2" || name == "x4")) {
            in.vector = u8(name[1] - '0');
        } else if (in.op == OP_ldmatrix && name == "m8n8") {
        } else if (name == "shiftamt" && in.op == OP_bfind) {
            in.shift_amount = true;
        } else if (name == "approx" && (in.op == OP_rcp || in.op == OP_sqrt)) {
            in.rounding = R_APPROX;
        } else if (const Rounding* rounding = found(kRoundings, name)) {
            in.rounding = *rounding;
        } else if (const Part* part = found(kParts, name)) {
            in.part = *part;
        } else if (const Space* space = found(kSpaces, name)) {
            in.space = *space;
        } else if (const u8* vector = found(kVectors, name)) {
            in.vector = *vector;
        } else if (name == "cta") {
            in.wide = false;
        } else if (name == "gpu" || name == "gl" || name == "sys") {
            in.wide = true;
        } else if (name == "relaxed" || name == "volatile") {
            in.strong = true;
        } else if (name == "acquire" || name == "release" || name == "acq_rel" || name == "sc") {
            in.strong = true;
            in.acquires = name != "release";
            in.releases = name != "acquire";
            in.sequential = name == "sc";
        } else if (name == "nc") {
            in.constant = true;
        } else if (name == "to") {
            in.to = true;
        } else if (name == "ftz") {
            in.ftz = true;
        } else if (name == "sat") {
            in.sat = true;
        } else {
            return kIgnored.count(name) != 0 || starts_with(name, "L1::") || starts_with(name, "L2::");
        }
        return true;
    }

    // Arithmetic of types that the machine does not know.
    static void check_type(const Instruction& in) {
        // clang-format off
        static const std::set<Opcode> kHalf = {OP_mov, OP_cvt, OP_cvta, OP_ld, OP_st, OP_abs, OP_neg};
        static const std::set<Opcode> kFloat = {
            OP_mov, OP_cvt, OP_ld, OP_st, OP_abs, OP_neg, OP_add, OP_sub, OP_mul, OP_fma, OP_div, OP_min, OP_max, OP_setp,
            OP_selp, OP_sqrt, OP_rcp};
        // clang-format on
        const bool whole = in.type == F32 || in.type == F64, pair = in.type == F16X2 || in.type == BF16X2;
        const bool half = in.type == F16 || in.type == BF16;
        const bool known = whole ? kFloat.count(in.op) : pair || half ? kHalf.count(in.op) : true;
        if (!known && !(half && in.op == OP_setp)) fail("type of " + in.text);
    }

    std::string source_;
    Module module_;
    Names<Function> functions_;
    std::vector<Variable> module_shared_;
    Variable dynamic_;
    // of the kernel that is read
    Kernel kernel_;
    std::vector<Names<u32>> scopes_;  // registers
    Names<s32> labels_;
    Names<u32> shared_, params_;
    std::vector<std::pair<size_t, std::string>> jumps_;
    std::set<u32> call_registers_;  // the variables of calls
    std::string inside_;            // before the labels of a call that is inlined
};

}  // namespace

Module parse_ptx(const std::string& text) { return Parser(text).parse(); }
