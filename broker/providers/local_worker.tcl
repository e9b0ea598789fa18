# The stand-in for a compute worker on this machine: dserv's port 2560, in one process of its own.
#
# A frame is a 4-byte big-endian length and that many bytes of UTF-8 Tcl; the answer is framed alike. An error is
# an ordinary frame that starts with `!TCL_ERROR `; a zero-length frame gets no answer. Connections persist and are
# answered in order. All clients share one interpreter, one script at a time, as they do in dserv; it is a child
# interpreter, so that no script can reach the variables of this server.
#
# `exit` in a script ends that script, with an empty answer, and nothing else: the interpreter belongs to every
# client, and only a RELEASE through the broker ends a worker. (dserv skips a script that starts with `exit`.)
#
# The leash is a dead man's switch: the broker touches a file; when it has not done so for too long, or has removed
# it, there is nobody left to release this worker, and it ends itself, in the middle of a script too. (A script
# that blocks in `exec` is looked at when that returns.)
#
# Environment: COMPUTE_BROKER_ADDRESS (127.0.0.1), COMPUTE_BROKER_PORT (2560; 0 takes a free one, shown on stdout),
# COMPUTE_BROKER_LEASH_FILE (none: no leash), COMPUTE_BROKER_LEASH_SECONDS (900), COMPUTE_BROKER_LEASH_CHECK_MS
# (2000). Exit codes: 0 the leash ended it, 64 a setting makes no sense, 98 the address cannot be had.

package require Tcl 8.6-

namespace eval ::local_worker {
    # What one frame may carry, either way. A longer length is a client that speaks something else (an HTTP request
    # reads as 1.2 GB), or work that belongs in a file.
    variable frame_bytes_max [expr {16 * 1024 * 1024}]
    # dserv's own limit, and far below the 1,024 descriptors that Tcl's select() can watch.
    variable connections_max 128
    # How long a refused client may go on sending before it is cut: closing on unread bytes resets the connection,
    # and the reset would overtake the sentence that says why.
    variable linger_ms_max 2000

    variable settings {}
    variable connections 0
    variable evaluating 0       ;# one script at a time, even when it enters the event loop
    variable turns_waiting {}   ;# connections whose script is complete, oldest first; at most connections_max
    variable script_exited 0
    variable leash_mtime_s ""   ;# as the last look found it
    variable leash_silent_ms 0
    variable leash_looked_ms 0
}

# ---------------------------------------------------------------- settings

# An environment value that is a whole number from low to high, else the fallback when it is not set.
proc ::local_worker::whole_number {key fallback low high} {
    set value [expr {[info exists ::env($key)] ? $::env($key) : $fallback}]
    if {![regexp {^[0-9]{1,9}$} $value] || [scan $value %d] < $low || [scan $value %d] > $high} {
        complain "$key is \"$value\": a whole number from $low to $high is needed"
        exit 64
    }
    return [scan $value %d]
}

proc ::local_worker::read_settings {} {
    variable settings
    foreach {name key fallback} {address COMPUTE_BROKER_ADDRESS 127.0.0.1 leash_file COMPUTE_BROKER_LEASH_FILE ""} {
        dict set settings $name [expr {[info exists ::env($key)] ? $::env($key) : $fallback}]
    }
    dict set settings port [whole_number COMPUTE_BROKER_PORT 2560 0 65535]
    dict set settings leash_ms [expr {1000 * [whole_number COMPUTE_BROKER_LEASH_SECONDS 900 1 604800]}]
    dict set settings leash_check_ms [whole_number COMPUTE_BROKER_LEASH_CHECK_MS 2000 1 60000]
    # A script evaluated here, or a program it starts, must not take this worker's port for the broker's.
    array unset ::env COMPUTE_BROKER_*
}

proc ::local_worker::complain {sentence} {
    catch {puts stderr "local_worker: $sentence"}
}

# ---------------------------------------------------------------- the leash

proc ::local_worker::leash_start {} {
    variable settings
    if {[dict get $settings leash_file] eq ""} return
    leash_watch
}

proc ::local_worker::leash_watch {} {
    variable settings
    leash_look
    after [dict get $settings leash_check_ms] ::local_worker::leash_watch
}

# Silence adds up from look to look, and no look counts for more than two intervals: a wall clock that jumps an hour
# ahead, or a laptop that wakes up, must not end a worker whose broker is alive. The age of the file itself is asked
# only where there is no earlier look to compare with.
proc ::local_worker::leash_look {} {
    variable settings
    variable leash_mtime_s
    variable leash_silent_ms
    if {[catch {file mtime [dict get $settings leash_file]} mtime_s options]} {
        set reason [lindex [dict get $options -errorcode] 1]
        if {$reason in {ENOENT ENOTDIR}} {leash_end "the leash file is gone"}
        set mtime_s $leash_mtime_s  ;# Unreadable for another reason: not gone, but silent.
    }
    set passed_ms [leash_passed_ms]
    if {$mtime_s eq $leash_mtime_s} {
        incr leash_silent_ms $passed_ms
    } else {
        set was_touched [expr {$leash_mtime_s ne "" && $mtime_s > $leash_mtime_s}]
        # `file mtime` cuts the fraction off: 999 ms in favour of life.
        set leash_silent_ms [expr {$was_touched ? 0 : max(0, [clock milliseconds] - 1000 * $mtime_s - 999)}]
        set leash_mtime_s $mtime_s
    }
    if {$leash_silent_ms > [dict get $settings leash_ms]} {
        leash_end "the leash file was not touched for [expr {$leash_silent_ms / 1000}] s"
    }
}

proc ::local_worker::leash_passed_ms {} {
    variable settings
    variable leash_looked_ms
    set now_ms [clock milliseconds]
    set passed_ms [expr {max(0, min($now_ms - $leash_looked_ms, 2 * [dict get $settings leash_check_ms]))}]
    set leash_looked_ms $now_ms
    return $passed_ms
}

proc ::local_worker::leash_end {reason} {
    complain "$reason; nobody can release this worker any more, so it ends"
    exit 0
}

# A script that computes without entering the event loop keeps the timer above from firing, so the interpreter's
# own time limit looks at the leash from inside it, and then allows itself the next interval.
proc ::local_worker::leash_hold_script {} {
    variable settings
    if {[dict get $settings leash_file] eq ""} return
    set until_ms [expr {[clock milliseconds] + [dict get $settings leash_check_ms]}]
    interp limit client_scripts time -seconds [expr {$until_ms / 1000}] -milliseconds [expr {$until_ms % 1000}]
}

proc ::local_worker::leash_look_from_script {} {
    leash_look
    leash_hold_script
}

# ---------------------------------------------------------------- the interpreter

proc ::local_worker::interpreter_create {} {
    interp create client_scripts
    interp alias client_scripts exit {} ::local_worker::script_exit
    interp limit client_scripts time -command ::local_worker::leash_look_from_script -granularity 10
}

# Called by a script: unwinds it to its start, past any catch, as leaving the process would have.
proc ::local_worker::script_exit {args} {
    variable script_exited 1
    interp cancel -unwind client_scripts "exit"
}

# The answer's text for one script.
proc ::local_worker::evaluate {script} {
    variable script_exited 0
    leash_hold_script
    set code [catch {interp eval client_scripts $script} result]
    interp limit client_scripts time -seconds {}
    if {$script_exited} {return ""}
    switch $code {
        0 - 2   {return $result}
        1       {return "!TCL_ERROR $result"}
        3       {return "!TCL_ERROR invoked \"break\" outside of a loop"}
        4       {return "!TCL_ERROR invoked \"continue\" outside of a loop"}
        default {return "!TCL_ERROR command returned bad code: $code"}
    }
}

# A script that enters the event loop (vwait, update) lets other connections' frames come in; they wait here, and
# the turn is handed on in the order of their arrival. Runs in the connection's coroutine.
proc ::local_worker::evaluate_in_turn {script} {
    variable evaluating
    variable turns_waiting
    if {$evaluating} {
        lappend turns_waiting [info coroutine]
        yield
    }
    set evaluating 1
    set answer [evaluate $script]
    if {[llength $turns_waiting]} {
        set turns_waiting [lassign $turns_waiting next]
        after 0 $next
    } else {
        set evaluating 0
    }
    return $answer
}

# ---------------------------------------------------------------- connections

proc ::local_worker::accept {chan peer_address peer_port} {
    variable connections
    variable connections_max
    if {$connections >= $connections_max} {
        close $chan
        return
    }
    incr connections
    coroutine ::local_worker::connection_$chan ::local_worker::serve $chan
}

# One connection, from its first frame to its last. Runs as a coroutine that yields while it waits for the peer.
proc ::local_worker::serve {chan} {
    variable connections
    chan configure $chan -blocking 0 -translation binary -buffering full -buffersize 65536
    try {
        while 1 {
            set script [encoding convertfrom utf-8 [read_frame $chan]]
            if {$script eq ""} continue
            write_frame $chan [evaluate_in_turn $script]
        }
    } trap {LOCAL_WORKER TOO_LONG} {sentence} {
        catch {
            write_frame $chan "!TCL_ERROR $sentence"
            linger $chan
        }
    } trap {LOCAL_WORKER CLOSED} {} {
    } trap {POSIX} {} {
        # The peer is gone: there is nobody to tell.
    } finally {
        incr connections -1
        catch {close $chan}
    }
}

proc ::local_worker::read_frame {chan} {
    variable frame_bytes_max
    binary scan [read_bytes $chan 4] Iu length
    if {$length > $frame_bytes_max} {
        throw {LOCAL_WORKER TOO_LONG} "a frame of $length bytes is more than the $frame_bytes_max bytes a worker reads"
    }
    return [read_bytes $chan $length]
}

proc ::local_worker::read_bytes {chan count} {
    set bytes ""
    while {[string length $bytes] < $count} {
        append bytes [chan read $chan [expr {$count - [string length $bytes]}]]
        if {[string length $bytes] == $count} break
        if {[chan eof $chan]} {throw {LOCAL_WORKER CLOSED} "closed by the peer"}
        wait_for $chan readable
    }
    return $bytes
}

# Returns when the kernel has taken the whole answer, so that a peer which asks without reading holds one answer
# here and not a growing heap of them.
proc ::local_worker::write_frame {chan answer} {
    variable frame_bytes_max
    set bytes [encoding convertto utf-8 $answer]
    if {[string length $bytes] > $frame_bytes_max} {
        set bytes "!TCL_ERROR the result has [string length $bytes] bytes, more than the $frame_bytes_max of a frame"
    }
    puts -nonewline $chan [binary format I [string length $bytes]]$bytes
    flush $chan
    while {[chan pending output $chan] > 0} {wait_for $chan writable}
}

proc ::local_worker::wait_for {chan event} {
    chan event $chan $event [info coroutine]
    yield
    chan event $chan $event {}
}

# Reads and forgets what a refused peer still sends, until it closes or linger_ms_max has passed.
proc ::local_worker::linger {chan} {
    variable linger_ms_max
    chan close $chan write
    set cut [after $linger_ms_max [info coroutine]]
    set until_ms [expr {[clock milliseconds] + $linger_ms_max}]
    while {![chan eof $chan] && [clock milliseconds] < $until_ms} {
        chan read $chan 65536
        wait_for $chan readable
    }
    after cancel $cut
}

# ---------------------------------------------------------------- start

proc ::local_worker::listen {} {
    variable settings
    dict with settings {
        if {[catch {socket -server ::local_worker::accept -myaddr $address $port} result]} {
            complain "cannot listen on $address:$port: [regsub {^couldn't open socket: } $result {}]"
            exit 98
        }
        if {$port == 0} {
            set ::tcl::unsupported::noReverseDNS 1  ;# -sockname would ask the resolver, which may take seconds
            set port [lindex [chan configure $result -sockname] 2]
        }
        # The caller may have closed our stdout; the line is a courtesy to whoever asked for port 0.
        catch {puts "local_worker: listening on $address:$port"; flush stdout}
    }
}

::local_worker::read_settings
::local_worker::interpreter_create
::local_worker::listen
::local_worker::leash_start
vwait ::local_worker::forever
