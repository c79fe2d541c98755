/* stores MODE DIR: real stores that write through mappings.
 *
 * lmdb, kyoto: transaction k sets the keys a and b to k; then k goes into DIR/log by a call.
 * check-lmdb, check-kyoto: whether a copy in DIR could be of one instant: a equal to b, and
 * log <= a <= log + 1. Prints a. */
#include "common.h"
#include <kclangc.h>
#include <lmdb.h>

static const char *dir;

static const char *in(const char *name)
{
    static char paths[4][4096];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, 4096, "%s/%s", dir, name);
    return path;
}

static void must(int result, const char *what)
{
    if (result != 0) {
        fprintf(stderr, "%s: %d\n", what, result);
        _exit(3);
    }
}

static MDB_env *lmdb_open(void)
{
    MDB_env *env;
    must(mdb_env_create(&env), "mdb_env_create");
    must(mdb_env_set_mapsize(env, 4 << 20), "mdb_env_set_mapsize");
    must(mdb_env_open(env, dir, MDB_WRITEMAP | MDB_NOSYNC, 0644), "mdb_env_open");
    return env;
}

static void lmdb_set(MDB_txn *txn, MDB_dbi dbi, const char *name, uint64_t k)
{
    MDB_val key = {1, (void *)name}, value = {sizeof k, &k};
    must(mdb_put(txn, dbi, &key, &value, 0), "mdb_put");
}

static uint64_t lmdb_get(MDB_txn *txn, MDB_dbi dbi, const char *name)
{
    MDB_val key = {1, (void *)name}, value;
    must(mdb_get(txn, dbi, &key, &value), "mdb_get");
    uint64_t k;
    memcpy(&k, value.mv_data, sizeof k);
    return k;
}

static KCDB *kyoto_open(void)
{
    KCDB *db = kcdbnew();
    if (!kcdbopen(db, in("store.kch"), KCOWRITER | KCOCREATE)) {
        fprintf(stderr, "kcdbopen: %s\n", kcdbemsg(db));
        _exit(3);
    }
    return db;
}

static uint64_t kyoto_get(KCDB *db, const char *name)
{
    uint64_t k = 0;
    if (kcdbgetbuf(db, name, 1, (char *)&k, sizeof k) != sizeof k)
        _exit(3);
    return k;
}

static int check(uint64_t a, uint64_t b)
{
    uint64_t k = 0;
    int fd = open(in("log"), O_RDONLY);
    if (fd < 0 || pread(fd, &k, sizeof k, 0) < 0)
        die("log");
    printf("%llu\n", (unsigned long long)a);
    if (a == b && k <= a && a <= k + 1)
        return 0;
    fprintf(stderr, "a %llu, b %llu, log %llu\n", (unsigned long long)a, (unsigned long long)b,
            (unsigned long long)k);
    return 1;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    const char *mode = argv[1];
    dir = argv[2];
    end_in_time(600);
    if (!strcmp(mode, "check-lmdb")) {
        MDB_txn *txn;
        MDB_dbi dbi;
        must(mdb_txn_begin(lmdb_open(), NULL, MDB_RDONLY, &txn), "mdb_txn_begin");
        must(mdb_dbi_open(txn, NULL, 0, &dbi), "mdb_dbi_open");
        return check(lmdb_get(txn, dbi, "a"), lmdb_get(txn, dbi, "b"));
    }
    if (!strcmp(mode, "check-kyoto")) {
        KCDB *db = kyoto_open();
        return check(kyoto_get(db, "a"), kyoto_get(db, "b"));
    }
    stats_open();
    int log = open(in("log"), O_RDWR | O_CREAT, 0644);
    if (log < 0)
        die("log");
    MDB_env *env = strcmp(mode, "lmdb") ? NULL : lmdb_open();
    KCDB *db = strcmp(mode, "kyoto") ? NULL : kyoto_open();
    for (uint64_t k = 1; env || db; k++) {
        if (env) {
            MDB_txn *txn;
            MDB_dbi dbi;
            must(mdb_txn_begin(env, NULL, 0, &txn), "mdb_txn_begin");
            must(mdb_dbi_open(txn, NULL, 0, &dbi), "mdb_dbi_open");
            lmdb_set(txn, dbi, "a", k);
            lmdb_set(txn, dbi, "b", k);
            must(mdb_txn_commit(txn), "mdb_txn_commit");
        } else if (!kcdbbegintran(db, 0) || !kcdbset(db, "a", 1, (char *)&k, sizeof k) ||
                   !kcdbset(db, "b", 1, (char *)&k, sizeof k) || !kcdbendtran(db, 1)) {
            fprintf(stderr, "%s\n", kcdbemsg(db));
            _exit(3);
        }
        if (pwrite(log, &k, sizeof k, 0) != sizeof k)
            die("log");
        atomic_fetch_add(&stats->beats, 1);
    }
    return 2;
}
