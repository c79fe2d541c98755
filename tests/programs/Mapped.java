import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;

/** Mapped DIR: what "stores.py mmap" does, by FileChannel.map. */
class Mapped {
    public static void main(String[] args) throws Exception {
        final int pages = 64, page = 4096;
        FileChannel map = new RandomAccessFile(args[0] + "/map", "rw").getChannel();
        FileChannel log = new RandomAccessFile(args[0] + "/log", "rw").getChannel();
        FileChannel stats = new RandomAccessFile(System.getenv("SNAPSHIM_TEST_STATS"), "rw").getChannel();
        MappedByteBuffer area = map.map(FileChannel.MapMode.READ_WRITE, 0, pages * page);
        area.order(ByteOrder.LITTLE_ENDIAN);
        ByteBuffer word = ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN);
        for (long k = 1;; k++) {
            for (int p = 0; p < pages; p++) {
                area.putLong(p * page, k);
                java.lang.invoke.VarHandle.fullFence();
            }
            word.putLong(0, k);
            log.write(word.rewind(), 0);
            stats.write(word.rewind(), 0);
        }
    }
}
