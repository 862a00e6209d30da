# Writes each block of C++ in a README to a file of its own; with -v language=cuda each block of CUDA. One of C++ without #include is the
# body of a function, over a device, x and weight.
BEGIN {
  if (!language) language = "cpp"
  extension = language == "cuda" ? "cu" : "cpp"
}
function finish() {
  if (!file) return
  if (is_body) print "}" >file
  close(file)
  file = ""
}
/^```/ {
  finish()
  in_block = $0 == "```" language
  next
}
in_block && !file {
  file = folder "/block" ++count "." extension
  is_body = language == "cpp" && $0 !~ /^#include/
  if (is_body) {
    print "#include <eigenformer/eigenformer.h>\nnamespace ef = eigenformer;" >file
    print "void block" count "(Eigen::ThreadPoolDevice& device, const ef::Tensor<float, 2>& x, const ef::Tensor<float, 1>& weight) {" >file
  }
}
in_block { print >file }
