# paths.pl NAME FILE N: see paths.c.
use strict;
use Fcntl;
my ($name, $path, $count) = @ARGV;
alarm 120;
my $parent = getppid;
open(my $f, '+>', $path) or die;
print $f "\0" x 16384;
$f->autoflush(1);
my $i = 1;
for (; !$count || $i <= $count; $i++) {
    my $record = sprintf "%-30s %032d\n", $name, $i;
    if ($name eq 'print') {
        seek $f, $i % 256 * 64, 0;
        print $f $record;
    } elsif ($name eq 'syswrite') {
        sysseek $f, $i % 256 * 64, 0;
        syswrite $f, $record;
    } elsif ($name eq 'sysopen') {
        sysopen my $g, $path, O_WRONLY | O_TRUNC or die;
        print $g $record x ($i % 7 + 1);
        close $g;
    } elsif ($name eq 'truncate') {
        truncate $f, 100 + $i % 100 or die;
        utime $i, $i, $path or die;
        rename $path, "$path.away" or die;
        rename "$path.away", $path or die;
    } else {
        exit 2;
    }
    if (!$count) {
        select undef, undef, undef, 0.0003;
        last if getppid != $parent;
    }
}
printf STDERR "%s: %d records\n", $name, $i - 1;
