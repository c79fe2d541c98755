"""H2 on OpenJDK; the load and the check are in H2.java."""

import os
import pathlib
import sys

import common

verb, data, scratch, mode = common.arguments()
jar = "/usr/share/java/h2.jar"
source = pathlib.Path(__file__).with_name("H2.java")
# Compiled once for each directory: the load's is that of the checks, too.
classes = pathlib.Path(scratch).parent / "h2-classes"
if not classes.exists():
    common.run(["javac", "-cp", jar, "-d", str(classes), str(source)])
java = ["java", "-XX:-UsePerfData", "-XX:TieredStopAtLevel=1", "-Xmx128m", "-cp", f"{jar}:{classes}", "H2", verb, data, scratch]
if verb == "load":
    os.execvp("java", java)
said = common.run(java)
sys.stdout.write(said)
