#!/usr/bin/env escript
%%! +S 2 +A 2
%% paths.escript NAME FILE N: see paths.c.
main([Name, Path, N]) ->
    ok = file:write_file(Path, binary:copy(<<0>>, 16384)),
    {ok, File} = file:open(Path, [read, write, raw, binary]),
    Count = list_to_integer(N),
    Deadline = erlang:monotonic_time(second) + 120,
    Last = loop(Name, Path, File, Count, Deadline, 1),
    io:format(standard_error, "~s: ~b records~n", [Name, Last - 1]).

loop(Name, Path, File, Count, Deadline, I) ->
    Now = erlang:monotonic_time(second),
    if
        Count > 0, I > Count -> I;
        Now > Deadline -> I;
        true ->
            Record = iolist_to_binary(io_lib:format("~-30s ~32..0b~n", [Name, I])),
            record(Name, Path, File, Record, I),
            if Count == 0 -> timer:sleep(1); true -> ok end,
            loop(Name, Path, File, Count, Deadline, I + 1)
    end.

record("pwrite", _, File, Record, I) ->
    ok = file:pwrite(File, I rem 256 * 64, Record);
record("write", _, File, Record, I) ->
    {ok, _} = file:position(File, I rem 256 * 64),
    ok = file:write(File, Record);
record("write_file", Path, _, Record, _) ->
    ok = file:write_file(Path ++ ".new", Record),
    ok = file:rename(Path ++ ".new", Path).
