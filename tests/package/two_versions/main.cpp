// The newer version is ours with another number, and with errors that begin with "newer ".
#include <cstdio>
#include <string>

int old_minor();
int new_minor();
std::string old_error();
std::string new_error();

int main() {
  const std::string old_text = old_error(), new_text = new_error();
  std::printf("two_versions: 0.%d says \"%s\", 0.%d says \"%s\"\n", old_minor(), old_text.c_str(),
              new_minor(), new_text.c_str());
  return new_minor() == old_minor() + 1 && old_text != "no error" && new_text == "newer " + old_text
             ? 0
             : 1;
}
