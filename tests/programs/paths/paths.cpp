// paths-cpp NAME FILE N: see paths.c.
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    const std::string name = argv[1], file = argv[2];
    const long count = std::stol(argv[3]);
    const pid_t parent = getppid();
    alarm(120);
    std::ofstream(file) << "start\n";
    std::ofstream stream(file, std::ios::in | std::ios::out);
    long i = 1;
    for (; count == 0 || i <= count; i++) {
        if (name == "ofstream") {
            stream.seekp(i % 256 * 16);
            stream << "record " << i << std::endl;
        } else if (name == "filesystem") {
            std::ofstream(file + ".new") << "record " << i << "\n";
            std::filesystem::rename(file + ".new", file);
            std::filesystem::create_directories(file + ".d/e");
            std::filesystem::copy_file(file, file + ".d/e/copy",
                                       std::filesystem::copy_options::overwrite_existing);
            std::filesystem::resize_file(file, 3 + i % 5);
            std::filesystem::remove_all(file + ".d");
        } else {
            return 2;
        }
        if (count == 0) {
            std::this_thread::sleep_for(std::chrono::microseconds(300));
            if (getppid() != parent)
                break;
        }
    }
    std::cerr << name << ": " << i - 1 << " records\n";
}
