/// \file
/// A chat template as a tree.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "value.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {
namespace chat {

/// What `parts` and `names` are, is said at each kind; a null part is one left out.
struct Node {
  enum class Kind {
    // statements
    block,     ///< parts: statements
    text,      ///< text
    output,    ///< parts: expression
    if_else,   ///< parts: condition, block, other block
    for_each,  ///< parts: list, condition, block, other block; names: variables
    assign,    ///< parts: expression; names: variables, or `space` and text: its member
    capture,   ///< parts: block, filters (a `piped`); names: variable
    macro,     ///< parts: block, defaults of the last arguments; text: name; names: arguments
    break_loop,
    continue_loop,
    // expressions
    constant,  ///< value
    name,      ///< text
    list,      ///< parts
    dict,      ///< parts: key, value, key, value, ...
    member,    ///< parts: object; text: name
    index,     ///< parts: object, key
    slice,     ///< parts: object, begin, end, step
    call,      ///< parts: function, arguments; names: of the last arguments
    filter,    ///< parts: value, arguments; text: name; names: of the last arguments
    test,      ///< parts: value, arguments; text: name
    unary,     ///< parts: value; text: operator
    binary,    ///< parts: left, right; text: operator
    choice,    ///< parts: condition, value, other value
    piped      ///< the value that a `capture` gives to its filters
  };
  Kind kind;
  int line = 1;
  std::string text = {};
  std::vector<std::string> names = {};
  std::vector<std::unique_ptr<Node>> parts = {};
  Value value = {};
  int height = 1;  ///< of the tree: what reads it, and what frees it, recurs so deep
};
using NodePtr = std::unique_ptr<Node>;

}  // namespace chat
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
