// H2 in one process, written by several connections: H2 load|check DATA SCRATCH

import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.*;
import java.sql.*;
import java.util.concurrent.ThreadLocalRandom;

public class H2 {
    static final int ACCOUNTS = 50, START = 1000, WORKERS = 2;

    static Connection connect(String data) throws SQLException {
        return DriverManager.getConnection("jdbc:h2:file:" + data + "/bank;DB_CLOSE_ON_EXIT=FALSE;LOCK_TIMEOUT=60000", "sa", "");
    }

    static long ask(Connection db, String question) throws SQLException {
        try (Statement s = db.createStatement(); ResultSet r = s.executeQuery(question)) {
            r.next();
            return r.getLong(1);
        }
    }

    static void work(String data, int worker) throws Exception {
        Connection db = connect(data);
        db.setAutoCommit(false);
        FileChannel ledger = FileChannel.open(Path.of(data, "ledger-" + worker), StandardOpenOption.CREATE, StandardOpenOption.WRITE);
        PreparedStatement take = db.prepareStatement("update account set balance = balance - ? where id = ?");
        PreparedStatement give = db.prepareStatement("update account set balance = balance + ? where id = ?");
        PreparedStatement move = db.prepareStatement("insert into move(worker, amount, note) values (?, ?, ?)");
        PreparedStatement done = db.prepareStatement("update done set count = count + 1 where worker = ?");
        var random = ThreadLocalRandom.current();
        for (long count = 1;; count++) {
            int one = random.nextInt(ACCOUNTS), other = (one + 1 + random.nextInt(ACCOUNTS - 1)) % ACCOUNTS, amount = random.nextInt(1, 100);
            // In one order, so that there are no deadlocks.
            PreparedStatement first = one < other ? take : give, second = one < other ? give : take;
            first.setInt(1, amount); first.setInt(2, Math.min(one, other)); first.executeUpdate();
            second.setInt(1, amount); second.setInt(2, Math.max(one, other)); second.executeUpdate();
            move.setInt(1, worker); move.setInt(2, amount); move.setString(3, "note ".repeat(40)); move.executeUpdate();
            done.setInt(1, worker); done.executeUpdate();
            db.commit();
            ByteBuffer number = ByteBuffer.allocate(8).putLong(0, count);
            ledger.write(number, 0);
            Thread.sleep(random.nextInt(8));
        }
    }

    static void check(String data) throws Exception {
        try (Connection db = connect(data)) {
            long balance = ask(db, "select sum(balance) from account"), moves = ask(db, "select count(*) from move");
            long counted = ask(db, "select sum(count) from done");
            System.out.println("updates " + moves + " of " + counted + ", balances " + balance);
            if (balance != ACCOUNTS * START) throw new Exception("balances add up to " + balance);
            if (moves != counted) throw new Exception(moves + " moves, " + counted + " counted");
            int behind = 0;
            for (int worker = 0; worker < WORKERS; worker++) {
                Path file = Path.of(data, "ledger-" + worker);
                long told = Files.exists(file) && Files.size(file) == 8 ? ByteBuffer.wrap(Files.readAllBytes(file)).getLong() : 0;
                long there = ask(db, "select count from done where worker = " + worker);
                // What was committed is written a little later (WRITE_DELAY).
                if (there > told + 1) throw new Exception(there + " updates, " + told + " in the ledger");
                behind += Math.max(0, told - there);
            }
            System.out.println("recovery " + behind + " updates acknowledged, but not written yet (WRITE_DELAY)");
            ask(db, "select count(*) from information_schema.tables");
            try (Statement s = db.createStatement()) { s.execute("script to '" + data + "/script.sql'"); }
            System.out.println("units " + moves);
        }
    }

    public static void main(String[] args) throws Exception {
        String data = args[1];
        if (args[0].equals("check")) {
            check(data);
            return;
        }
        try (Connection db = connect(data); Statement s = db.createStatement()) {
            s.execute("create table account(id int primary key, balance int)");
            s.execute("create table done(worker int primary key, count int)");
            s.execute("create table move(id identity, worker int, amount int, note varchar)");
            s.execute("insert into account select x - 1, " + START + " from system_range(1, " + ACCOUNTS + ")");
            s.execute("insert into done select x - 1, 0 from system_range(1, " + WORKERS + ")");
            for (int i = 0; i < WORKERS; i++) {
                int worker = i;
                new Thread(() -> {
                    try { work(data, worker); } catch (Exception e) { e.printStackTrace(); System.exit(1); }
                }).start();
            }
            while (ask(db, "select sum(count) from done") < 20) Thread.sleep(20);
            Files.createFile(Path.of(args[2], "ready"));
            Thread.sleep(Long.MAX_VALUE);
        }
    }
}
