# compute_broker: ask a broker for a compute worker, keep it, use it, give it back.
#
#     package require compute_broker
#     compute_broker::with_worker {-cores 64} w {
#         puts [compute_broker::remote_eval $w {info hostname}]
#     }
#
# Everything waits in the event loop (vwait), so keep-alives go on while a worker computes for an hour. What they
# cannot survive is a body of Tcl that computes for long without entering the event loop itself.
#
# Failures are Tcl errors with errorCode {COMPUTE_BROKER <CODE> ...}: the broker's own code (NO_CAPACITY, LIMIT,
# BAD_REQUEST, ...), UNKNOWN_COMMAND, WORKER_NOT_FOUND, or ERROR when it gave none; CONNECTION <posix>; TIMEOUT;
# PROTOCOL for an answer that makes no sense; REMOTE for an error in the worker's script. BAD_REQUEST is raised here
# too, for a value that must not be sent. An error reply is never returned as an address.

package require Tcl 8.6-
foreach part {call.tcl protocol.tcl leases.tcl} {
    source [file join [file dirname [info script]] $part]
}

namespace eval ::compute_broker {
    namespace export configure get_worker ping release status with_worker remote_eval keep_alive stop_keep_alive \
        request
    namespace ensemble create

    # All times in seconds. An idle worker is reaped after minutes: 30 s between pings leaves room for several to
    # be lost. A remote script may take a day, longer than any worker lives by default.
    variable settings [dict create -host "" -port "" -client "" -timeout 10 -connect_timeout 10 \
        -retries 5 -keep_alive 30 -eval_timeout 86400 -log ::compute_broker::log_to_stderr]

    # The broker waits 900 s for a worker when it is not told otherwise; the margin lets its answer be heard.
    variable get_worker_wait_s 900
    variable get_worker_margin_s 30

    variable remote_port 2560
    # A worker that the broker does not know twice in a row is gone; once may be a broker that just started.
    variable keep_alive_misses_max 2

    variable serial 0        ;# of calls, for the variables that vwait waits on
    variable blocks 0        ;# of with_worker, for their names
    variable outcome         ;# serial -> outcome of a call that somebody waits for
    variable kept            ;# {ip client} -> dict: seconds misses timer call
    variable evaluations     ;# Call -> ip, of remote_evals under way
    array set outcome {}
    array set kept {}
    array set evaluations {}
}

# ---------------------------------------------------------------- commands

# configure: all settings. configure -name: one. configure -name value ...: sets, all or nothing.
proc ::compute_broker::configure {args} {
    variable settings
    if {[llength $args] == 0} {return $settings}
    if {[llength $args] == 1} {
        set name [lindex $args 0]
        options $settings [list $name ""]
        return [dict get $settings $name]
    }
    set changed [options $settings $args]
    check_settings $changed
    set settings $changed
    return
}

# The address of a ready worker, renewing this client's lease on it. Options: -pool -cores -type -region -wait
# -exclusive, as the broker's GET_WORKER; an empty value means "not given". -client name asks under another name;
# -timeout is in seconds, by default -wait (or the broker's 900) and 30 more: a boot takes its time.
proc ::compute_broker::get_worker {args} {
    variable get_worker_wait_s
    variable get_worker_margin_s
    set given [options {-pool "" -cores "" -type "" -region "" -wait "" -exclusive "" -client "" -timeout ""} $args]
    dict with given {}
    set wait_s [expr {${-wait} eq "" ? $get_worker_wait_s : [check wait -wait ${-wait}]}]
    if {${-timeout} eq ""} {set -timeout [expr {$wait_s + $get_worker_margin_s}]}
    set reply [ask [get_worker_line $given] ${-timeout}]
    if {![is_address $reply]} {
        throw {COMPUTE_BROKER PROTOCOL} "the broker answered \"[string range $reply 0 79]\", which is no address"
    }
    return $reply
}

# OK when the broker knows the worker; this client's lease is renewed. Otherwise an error.
proc ::compute_broker::ping {ip args} {
    set given [options {-client "" -timeout ""} $args]
    return [expect_ok [ask [ping_line $ip [dict get $given -client]] [dict get $given -timeout]]]
}

# Ends this client's lease, and its keep-alive. The broker ends the worker when no other client holds it, or at
# once with -force 1.
proc ::compute_broker::release {ip args} {
    set given [options {-force 0 -client "" -timeout ""} $args]
    dict with given {}
    set client [client_name ${-client}]
    set line "RELEASE [check address worker $ip]"
    if {[check boolean -force ${-force}]} {append line " force"}
    keep_alive_end [list $ip ${-client}]
    return [expect_ok [ask "$line client=$client" ${-timeout}]]
}

# The broker's books as one line of JSON, as it came.
proc ::compute_broker::status {args} {
    return [ask STATUS [dict get [options {-timeout ""} $args] -timeout]]
}

# One line to the broker, its reply line back; an ERROR reply is raised. Sent again only when the broker was not
# there at all, as nobody knows what the line does twice.
proc ::compute_broker::request {line args} {
    return [ask $line [dict get [options {-timeout ""} $args] -timeout] 0]
}

# Gets a worker under a name of its own, runs body with the address in varName, keeps the lease alive while the
# event loop runs, and releases it however the body ends. The result, or the error, return, break or continue of
# the body is that of with_worker. Takes get_worker's options, and -keep_alive seconds.
proc ::compute_broker::with_worker {options varName body} {
    variable settings
    set given [options {-keep_alive "" -pool "" -cores "" -type "" -region "" -wait "" -exclusive "" -timeout ""} \
        $options]
    set every_s [dict get $given -keep_alive]
    dict unset given -keep_alive
    if {$every_s eq ""} {set every_s [dict get $settings -keep_alive]}
    check interval -keep_alive $every_s
    set client [block_name]
    upvar 1 $varName ip
    set worker [get_worker {*}$given -client $client]
    keep_alive $worker $every_s $client
    set code [catch {
        set ip $worker
        uplevel 1 $body
    } result how]
    if {[catch {release $worker -client $client} trouble]} {
        # The body's result is worth more than this: the broker reaps a worker that nobody uses.
        note "could not release $worker: $trouble"
    }
    dict incr how -level
    return -options $how $result
}

# Evaluates script in the worker's shared interpreter and returns its result. An error there is raised here with
# errorCode {COMPUTE_BROKER REMOTE}. Waits in the event loop. Giving up (-timeout) does not stop the script.
proc ::compute_broker::remote_eval {ip script args} {
    variable settings
    variable remote_port
    set given [options {-port "" -timeout ""} $args]
    dict with given {}
    if {${-port} eq ""} {set -port $remote_port}
    if {${-timeout} eq ""} {set -timeout [dict get $settings -eval_timeout]}
    set call_of [dict create host [check host worker $ip] port [check port -port ${-port}] \
        payload [frame_of $script] reader ::compute_broker::read_frame resend 0 \
        timeout_ms [milliseconds_of -timeout ${-timeout}]]
    if {$script eq ""} {return ""}  ;# a zero-length frame gets no answer
    set answer [perform $call_of $ip]
    if {[string match "!TCL_ERROR *" $answer]} {
        throw {COMPUTE_BROKER REMOTE} [string range $answer 11 end]
    }
    return $answer
}

# Pings ip every so many seconds, from the event loop, until stop_keep_alive or release. A worker that the broker
# no longer knows is dropped, and the remote_evals that still wait for it fail with WORKER_NOT_FOUND: a machine
# that was taken away closes no connection.
proc ::compute_broker::keep_alive {ip {seconds ""} {client ""}} {
    variable settings
    variable kept
    if {$seconds eq ""} {set seconds [dict get $settings -keep_alive]}
    check interval seconds $seconds
    ping_line $ip $client  ;# raises now what would otherwise be raised in the background
    set key [list $ip $client]
    keep_alive_end $key
    set kept($key) [dict create seconds $seconds misses 0 timer "" call ""]
    keep_alive_schedule $key
    return
}

proc ::compute_broker::stop_keep_alive {ip {client ""}} {
    keep_alive_end [list $ip $client]
    return
}

# ---------------------------------------------------------------- keep-alive

# The next ping is set when the last has ended, so pings never pile up on a broker that does not answer.
proc ::compute_broker::keep_alive_schedule {key} {
    variable kept
    set wait_ms [milliseconds_of seconds [dict get $kept($key) seconds]]
    dict set kept($key) timer [after $wait_ms [list ::compute_broker::keep_alive_ping $key]]
}

proc ::compute_broker::keep_alive_ping {key} {
    variable kept
    if {[catch {
        dict set kept($key) call [call_start [broker_call [ping_line {*}$key] "" 1] \
            [list ::compute_broker::keep_alive_done $key]]
    } trouble]} {
        # Only a setting that was valid when it was set, and is not now (the environment's port, for one).
        note "keep-alive of [lindex $key 0] ends: $trouble"
        keep_alive_end $key
    }
}

proc ::compute_broker::keep_alive_done {key outcome} {
    variable kept
    variable keep_alive_misses_max
    if {![info exists kept($key)]} return
    dict set kept($key) call ""
    if {[catch {expect_ok [reply_of [answer_of $outcome]]} trouble options]} {
        set code [lindex [dict get $options -errorcode] 1]
        note "keep-alive of [lindex $key 0]: $trouble"
        dict set kept($key) misses [expr {$code eq "WORKER_NOT_FOUND" ? [dict get $kept($key) misses] + 1 : 0}]
        if {$code eq "UNKNOWN_COMMAND"} {keep_alive_end $key}
    } else {
        dict set kept($key) misses 0
    }
    if {![info exists kept($key)]} return
    if {[dict get $kept($key) misses] >= $keep_alive_misses_max} {
        keep_alive_end $key
        evaluations_fail [lindex $key 0]
    } else {
        keep_alive_schedule $key
    }
}

proc ::compute_broker::keep_alive_end {key} {
    variable kept
    if {![info exists kept($key)]} return
    after cancel [dict get $kept($key) timer]
    set call [dict get $kept($key) call]
    if {$call ne ""} {$call destroy}
    unset kept($key)
}

proc ::compute_broker::evaluations_fail {ip} {
    variable evaluations
    foreach {call host} [array get evaluations] {
        # One that has its answer may still be listed here, below a wait that started later.
        if {$host ne $ip || ![info object isa object $call]} continue
        $call fail {COMPUTE_BROKER WORKER_NOT_FOUND} "$ip: the broker no longer has this worker"
    }
}

# ---------------------------------------------------------------- calls

# Sends one line and returns the reply, or raises what it says. Our own lines may be sent twice: for a client with
# a name, GET_WORKER, PING and RELEASE do nothing more the second time.
proc ::compute_broker::ask {line timeout_s {resend 1}} {
    return [reply_of [perform [broker_call $line $timeout_s $resend]]]
}

proc ::compute_broker::broker_call {line timeout_s resend} {
    variable settings
    variable line_bytes_max
    if {![regexp {^[\x20-\x7e]*$} $line]} {bad "a command is one line of printable ASCII"}
    if {[string length $line] > $line_bytes_max} {bad "a command has at most $line_bytes_max bytes"}
    if {$timeout_s eq ""} {set timeout_s [dict get $settings -timeout]}
    lassign [host_and_port [dict get $settings -host] [dict get $settings -port]] host port
    return [dict create host $host port $port payload "$line\n" reader ::compute_broker::read_line resend $resend timeout_ms [milliseconds_of -timeout $timeout_s]]
}

proc ::compute_broker::call_start {call_of callback} {
    variable settings
    dict set call_of retries [dict get $settings -retries]
    dict set call_of connect_ms [milliseconds_of -connect_timeout [dict get $settings -connect_timeout]]
    return [Call new $call_of $callback]
}

# Runs a call to its end in the event loop: its answer, or its error; wait_for: its outcome, as Call tells it. A call to
# a worker says to which.
proc ::compute_broker::perform {call_of {evaluation_ip ""}} {
    return [answer_of [wait_for $call_of $evaluation_ip]]
}

proc ::compute_broker::wait_for {call_of {evaluation_ip ""}} {
    variable serial
    variable outcome
    variable evaluations
    set id [incr serial]
    set call [call_start $call_of [list set ::compute_broker::outcome($id)]]
    if {$evaluation_ip ne ""} {set evaluations($call) $evaluation_ip}
    try {
        vwait ::compute_broker::outcome($id)
        return $outcome($id)
    } finally {
        if {[info object isa object $call]} {$call destroy}  ;# only when vwait itself was broken off
        unset -nocomplain outcome($id) evaluations($call)
    }
}

# ---------------------------------------------------------------- settings

proc ::compute_broker::check_settings {settings} {
    host_and_port [dict get $settings -host] [dict get $settings -port]
    dict for {name kind} {-timeout interval -connect_timeout interval -retries retries
            -keep_alive interval -eval_timeout interval} {
        check $kind $name [dict get $settings $name]
    }
    if {[dict get $settings -client] ne ""} {check client -client [dict get $settings -client]}
}

# Known options and their values: the defaults with what was given put over them.
proc ::compute_broker::options {known given} {
    if {[llength $given] % 2} {bad "option \"[lindex $given end]\" has no value"}
    foreach {name value} $given {
        if {![dict exists $known $name]} {bad "there is no option \"$name\": [join [dict keys $known] {, }]"}
        dict set known $name $value
    }
    return $known
}

# What nobody waits for, and somebody may want to know. -log is a command prefix; empty is silence.
proc ::compute_broker::note {sentence} {
    variable settings
    set log [dict get $settings -log]
    if {$log ne ""} {catch {uplevel #0 [list {*}$log $sentence]}}
}

proc ::compute_broker::log_to_stderr {sentence} {
    puts stderr "compute_broker: $sentence"
}

package provide compute_broker 0.1.0
