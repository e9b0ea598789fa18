# What goes over the wire, in both directions, and what must not: command lines, replies, dserv's frames, names and
# the checks of every value. Pure: no socket, no clock, nothing but its arguments, this package's settings and
# the environment.

namespace eval ::compute_broker {
    variable line_bytes_max 1024            ;# the broker reads no longer command
    variable reply_bytes_max 16777216       ;# STATUS of 50,000 workers
    variable frame_bytes_max 268435456      ;# one answer of a worker; more belongs in a file
    variable client_bytes_max 64

    # What a value must be, by kind: the test, and the words for it. The broker's own limits for what goes into a
    # line; for a time of ours a hundredth of a second to a week.
    variable kinds {
        word     {regexp {^[A-Za-z0-9._:-]{1,255}$} $value}         {a word of letters, digits and . _ : -}
        client   {regexp {^[A-Za-z0-9._@:/+-]{1,64}$} $value}       {1 to 64 letters, digits and . _ @ : / + -}
        cores    {is_whole $value 1 100000}                         {a whole number from 1 to 100000}
        wait     {is_seconds $value 0 86400}                        {a number of seconds from 0 to 86400}
        boolean  {string is boolean -strict $value}                 {a boolean}
        address  {is_address $value}                                {an address}
        host     {is_host $value}                                   {a host name or an address}
        port     {is_whole $value 1 65535}                          {a port from 1 to 65535}
        retries  {is_whole $value 0 20}                             {a whole number from 0 to 20}
        interval {is_seconds $value 0.01 604800}                    {a number of seconds from 0.01 to 604800}
    }
}

# ---------------------------------------------------------------- lines and frames

proc ::compute_broker::get_worker_line {given} {
    set line GET_WORKER
    foreach {name kind} {-pool word -cores cores -type word -region word -wait wait -exclusive boolean} {
        set value [dict get $given $name]
        if {$value eq ""} continue
        check $kind $name $value
        if {$kind eq "boolean"} {set value [expr {$value ? "yes" : "no"}]}
        append line " [string range $name 1 end]=$value"
    }
    return "$line client=[client_name [dict get $given -client]]"
}

proc ::compute_broker::ping_line {ip client} {
    return "PING [check address worker $ip] client=[client_name $client]"
}

# The answer in a call's outcome, or the error that the call ended with.
proc ::compute_broker::answer_of {outcome} {
    lassign $outcome how answer message
    if {$how eq "error"} {throw $answer $message}
    return $answer
}

# A reply line as it is, or the error that it stands for.
proc ::compute_broker::reply_of {line} {
    if {![regexp {^ERROR(?:: ?(.*))?$} $line -> sentence]} {return $line}
    if {$sentence eq "Unknown command"} {throw {COMPUTE_BROKER UNKNOWN_COMMAND} $sentence}
    if {$sentence eq "Worker not found"} {throw {COMPUTE_BROKER WORKER_NOT_FOUND} $sentence}
    if {$sentence eq {that lease has ended [DENIED]}} {
        throw {COMPUTE_BROKER DENIED LEASE_ENDED} "that lease has ended"
    }
    if {[regexp {^(.*) \[([A-Z_]+)\]$} $sentence -> text code]} {throw [list COMPUTE_BROKER $code] $text}
    if {$sentence eq ""} {set sentence "the broker reports an error without a reason"}
    throw {COMPUTE_BROKER ERROR} $sentence
}

proc ::compute_broker::expect_ok {reply} {
    if {$reply eq "OK"} {return OK}
    throw {COMPUTE_BROKER PROTOCOL} "the broker answered \"[string range $reply 0 79]\" and not OK"
}

# The readers of Call: all bytes so far -> {} or a list with the answer.
proc ::compute_broker::read_line {bytes} {
    variable reply_bytes_max
    set end [string first \n $bytes]
    if {$end < 0 && [string length $bytes] > $reply_bytes_max} {
        throw {COMPUTE_BROKER PROTOCOL} "the broker's reply has more than $reply_bytes_max bytes"
    }
    if {$end < 0} return
    return [list [encoding convertfrom utf-8 [string trimright [string range $bytes 0 $end-1] \r]]]
}

proc ::compute_broker::read_frame {bytes} {
    variable frame_bytes_max
    if {![binary scan $bytes Iu length]} return
    if {$length > $frame_bytes_max} {
        throw {COMPUTE_BROKER PROTOCOL} "the worker's answer has $length bytes, more than $frame_bytes_max"
    }
    if {[string length $bytes] < 4 + $length} return
    return [list [encoding convertfrom utf-8 [string range $bytes 4 [expr {3 + $length}]]]]
}

# The length counts bytes, so the script is encoded first.
proc ::compute_broker::frame_of {script} {
    if {[string first \0 $script] >= 0} {bad "a script with a NUL in it would be cut there by the worker"}
    set bytes [encoding convertto utf-8 $script]
    return [binary format I [string length $bytes]]$bytes
}

# ---------------------------------------------------------------- names

# Who asks: the name given, else the configured one, else one for this process.
proc ::compute_broker::client_name {{given ""}} {
    variable settings
    if {$given ne ""} {return [check client -client $given]}
    set configured [dict get $settings -client]
    if {$configured ne ""} {return [check client -client $configured]}
    return [numbered_name 0]
}

# A name for one with_worker block. No two blocks share one, or the end of the first would end the second's lease.
proc ::compute_broker::block_name {} {
    variable blocks
    return [numbered_name [incr blocks]]
}

# <user>@<host>/<pid>.<n>: the configured name stands for the user.
proc ::compute_broker::numbered_name {n} {
    variable settings
    set name [dict get $settings -client]
    if {$name eq ""} {set name [user_name]}
    if {[string first @ $name] < 0} {append name @[info hostname]}
    return [fitted_name $name /[pid][interpreter_mark].$n]
}

# A name's forbidden characters become dashes. When it is too long its end gives way to a checksum of the whole,
# so that two long names that differ stay two.
proc ::compute_broker::fitted_name {name suffix} {
    variable client_bytes_max
    set clean [regsub -all {[^A-Za-z0-9._@:/+-]} $name -]
    set room [expr {$client_bytes_max - [string length $suffix]}]
    if {[string length $clean] > $room} {
        set mark .[format %08x [zlib crc32 [encoding convertto utf-8 $name]]]
        set clean [string range $clean 0 $room-[expr {1 + [string length $mark]}]]$mark
    }
    return $clean$suffix
}

proc ::compute_broker::user_name {} {
    return [environment_or USER [environment_or LOGNAME $::tcl_platform(user)]]
}

# Threads and child interpreters load this package again, count from 0 again, and have the same process id. Only a
# main interpreter has argv0; the others are told apart by when they came.
proc ::compute_broker::interpreter_mark {} {
    variable mark
    if {![info exists mark]} {set mark [expr {[info exists ::argv0] ? "" : ".[format %llx [clock microseconds]]"}]}
    return $mark
}

# ---------------------------------------------------------------- checks

# What goes into a line is checked first: nothing a caller passes can add a word or a line to a command.
proc ::compute_broker::check {kind name value} {
    variable kinds
    foreach {known test wanted} $kinds {
        if {$known ne $kind} continue
        if {[apply [list value $test ::compute_broker] $value]} {return $value}
        bad "$name is \"[string range $value 0 79]\": $wanted is needed"
    }
    error "no kind of value is called \"$kind\""
}

proc ::compute_broker::is_whole {text low high} {
    return [expr {[regexp {^(0|[1-9][0-9]{0,8})$} $text] && $low <= $text && $text <= $high}]
}

proc ::compute_broker::is_seconds {text low high} {
    return [expr {[regexp {^(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?$} $text] && $low <= $text && $text <= $high}]
}

# Where the broker is. The host may be host:port or [v6]:port; a port given apart beats that one. Without a host,
# COMPUTE_BROKER_HOST and COMPUTE_BROKER_PORT say it.
proc ::compute_broker::host_and_port {host port} {
    set fallback 9000
    if {$host eq ""} {
        set host [environment_or COMPUTE_BROKER_HOST 127.0.0.1]
        set fallback [environment_or COMPUTE_BROKER_PORT $fallback]
    }
    set name $host
    set inside ""
    if {![regexp {^([^:]*):([0-9]+)$} $host -> name inside]} {
        regexp {^\[([^][]*)\](?::([0-9]+))?$} $host -> name inside
    }
    foreach candidate [list $inside $fallback] {
        if {$port eq ""} {set port $candidate}
    }
    return [list [check host -host $name] [check port -port $port]]
}

proc ::compute_broker::environment_or {key fallback} {
    if {[info exists ::env($key)] && $::env($key) ne ""} {return $::env($key)}
    return $fallback
}

proc ::compute_broker::is_host {text} {
    return [expr {[regexp {^[A-Za-z0-9._-]{1,255}$} $text] || [is_ipv6 $text]}]
}

# An IPv4 or IPv6 address, or a DNS name, which a pool may hand out instead: dots in it, letters at its end.
proc ::compute_broker::is_address {text} {
    if {[string length $text] > 255} {return 0}
    if {[regexp {^[0-9.]+$} $text]} {return [is_ipv4 $text]}
    if {[string first : $text] >= 0} {return [is_ipv6 $text]}
    return [regexp {^([A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?\.)+[A-Za-z]+$} $text]
}

proc ::compute_broker::is_ipv4 {text} {
    set parts [split $text .]
    foreach part $parts {
        if {![is_whole $part 0 255]} {return 0}
    }
    return [expr {[llength $parts] == 4}]
}

# Eight groups of hex digits, or fewer with one gap; an embedded IPv4 address is nothing a broker hands out.
proc ::compute_broker::is_ipv6 {text} {
    set gaps [regexp -all {::} $text]
    set groups [llength [regexp -all -inline {[0-9A-Fa-f]{1,4}} $text]]
    if {![regexp {^(::)?([0-9A-Fa-f]{1,4}(::?|$))*$} $text] || [regexp {[^:]:$} $text]} {return 0}
    return [expr {$gaps == 1 ? $groups < 8 : $gaps == 0 && $groups == 8}]
}

proc ::compute_broker::milliseconds_of {name seconds} {
    return [expr {round(1000 * [check interval $name $seconds])}]
}

proc ::compute_broker::bad {sentence} {
    throw {COMPUTE_BROKER BAD_REQUEST} $sentence
}
