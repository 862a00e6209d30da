# Writes each block of C++ in a README to a file of its own. One without #include is the body of a function, over a device, x and weight.
function finish() {
  if (!file) return
  if (is_body) print "}" >file
  close(file)
  file = ""
}
/^```/ {
  finish()
  in_block = $0 == "```cpp"
  next
}
in_block && !file {
  file = folder "/block" ++count ".cpp"
  is_body = $0 !~ /^#include/
  if (is_body) {
    print "#include <eigenformer/eigenformer.h>\nnamespace ef = eigenformer;" >file
    print "void block" count "(Eigen::ThreadPoolDevice& device, const ef::Tensor<float, 2>& x, const ef::Tensor<float, 1>& weight) {" >file
  }
}
in_block { print >file }
