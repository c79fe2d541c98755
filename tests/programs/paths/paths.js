// node paths.js NAME FILE N: see paths.c.
const fs = require('fs');
const [name, path, n] = process.argv.slice(2);
const count = Number(n), parent = process.ppid, begin = Date.now();
fs.writeFileSync(path, Buffer.alloc(16384));
const fd = fs.openSync(path, 'r+');
const pause = new Int32Array(new SharedArrayBuffer(4));
let stream = null;

function over(i) {
    if (count) return i > count;
    Atomics.wait(pause, 0, 0, 0.5);
    return process.ppid !== parent || Date.now() - begin > 120000;
}
function done(i) {
    process.stderr.write(`${name}: ${i - 1} records\n`, () => process.exit(0));
}
async function main() {
    let i = 1;
    for (; !over(i); i++) {
        const record = Buffer.from(name.padEnd(30) + String(i).padStart(33, '0') + '\n');
        const at = i % 256 * 64;
        if (name === 'writeSync') {
            fs.writeSync(fd, record, 0, 64, at);
        } else if (name === 'promises') {
            const handle = await fs.promises.open(path, 'r+');
            await handle.write(record, 0, 64, at);
            await handle.close();
        } else if (name === 'stream') {
            stream = stream || fs.createWriteStream(path, {flags: 'r+'});
            await new Promise(go => stream.write(record, go));
            if (i % 256 === 0) {
                await new Promise(go => stream.end(go));
                stream = null;
            }
        } else if (name === 'copyFile') {
            fs.writeFileSync(path + '.new', record);
            fs.copyFileSync(path + '.new', path);
        } else if (name === 'writeFileSync') {
            fs.writeFileSync(path, record);
            fs.renameSync(path, path + '.away');
            fs.renameSync(path + '.away', path);
        } else {
            process.exit(2);
        }
    }
    done(i);
}
main();
