// A program with a dynamic linker and without a libc, as the Go toolchain makes them.
void _start(void) {
    static const char text[] = "no libc\n";
    __asm__ volatile("syscall" ::"a"(1), "D"(1), "S"(text), "d"(sizeof text - 1)
                     : "rcx", "r11", "memory");
    __asm__ volatile("syscall" ::"a"(231), "D"(0) : "rcx", "r11", "memory");
}
