int main2() { return 0; }
