// java Paths NAME FILE N: see paths.c.
import java.io.*;
import java.nio.*;
import java.nio.channels.*;
import java.nio.file.*;

public class Paths {
    public static void main(String[] args) throws Exception {
        String name = args[0];
        Path path = Path.of(args[1]);
        long count = Long.parseLong(args[2]);
        long parent = ProcessHandle.current().parent().get().pid();
        long begin = System.nanoTime();
        Files.write(path, new byte[16384]);
        RandomAccessFile random = new RandomAccessFile(path.toFile(), "rw");
        FileChannel channel = random.getChannel();
        MappedByteBuffer map = null;
        if (name.equals("FileChannel.map"))
            map = channel.map(FileChannel.MapMode.READ_WRITE, 0, 16384);
        FileOutputStream stream = new FileOutputStream(path.toFile(), true);
        long i = 1;
        for (; count == 0 || i <= count; i++) {
            byte[] record = String.format("%-30s %032d\n", name, i).getBytes();
            int at = (int) (i % 256 * 64);
            switch (name) {
            case "FileOutputStream":
                stream.write(record);
                if (i % 256 == 0)
                    channel.truncate(0);
                break;
            case "RandomAccessFile":
                random.seek(at);
                random.write(record);
                break;
            case "FileChannel":
                channel.write(ByteBuffer.wrap(record), at);
                break;
            case "FileChannel.map":
                map.position(at);
                map.put(record);
                break;
            case "Files":
                Path fresh = Path.of(args[1] + ".new");
                Files.write(fresh, record);
                Files.move(fresh, path, StandardCopyOption.REPLACE_EXISTING);
                break;
            case "transferTo":
                try (FileChannel from = FileChannel.open(path, StandardOpenOption.READ)) {
                    from.transferTo(8192 + at % 8192, 64, channel.position(at % 8192));
                }
                break;
            default:
                System.exit(2);
            }
            if (count == 0) {
                Thread.sleep(0, 300000);
                if (ProcessHandle.current().parent().get().pid() != parent
                        || System.nanoTime() - begin > 120e9)
                    break;
            }
        }
        System.err.println(name + ": " + (i - 1) + " records");
    }
}
