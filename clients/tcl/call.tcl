# One request and its answer over TCP, without ever blocking the event loop.
#
# A Call connects, writes its bytes, and gives what it receives to a reader until the reader has a whole answer. One
# deadline bounds everything, the attempts in between too. An attempt is repeated only when that is safe: the
# connection was refused before a byte went out, or it was lost before a byte of the answer came in and the request
# may be sent twice (`resend`; with `always` also when a part of the answer has come). The end is told to a callback,
# exactly once, as a list: {ok <answer>} or {error <errorcode> <message>}. A call that `stays` leaves its connection
# open for the callback, which gets {ok <answer> <channel> <all bytes>}. Destroying a Call gives it up silently.
#
# A name that is not an address is looked up by the system's resolver, which does block: Tcl has no other.

namespace eval ::compute_broker {
    # Enough to sit out the restart of a broker (6.2 s at five retries), and no hot loop.
    variable retry_pause_ms_first 200
    variable retry_pause_ms_max 5000
    # Failures that show that the other side was not there, or went away; a retry may find it.
    variable retried_errors {ECONNREFUSED ECONNRESET ECONNABORTED EPIPE}
    # `fconfigure -error` has only words for why a connection failed; errorCode wants the name.
    variable posix_names {
        {connection refused} ECONNREFUSED {connection reset by peer} ECONNRESET {connection timed out} ETIMEDOUT
        {host is unreachable} EHOSTUNREACH {network is unreachable} ENETUNREACH {permission denied} EACCES
        {cannot assign requested address} EADDRNOTAVAIL {connection aborted} ECONNABORTED
        {software caused connection abort} ECONNABORTED {broken pipe} EPIPE
    }
}

oo::class create ::compute_broker::Call {
    variable host port payload reader resend retries connect_ms done
    variable chan attempts sent received deadline_timer step_timer stays owns

    # to: the keys host port payload reader resend retries connect_ms timeout_ms. `reader` is a command prefix that
    # gets all bytes received so far and returns {} for "more is needed" or a list with the answer in it; an error
    # it raises ends the call. Optional: stays; owns, an object that hears of each attempt by
    # `fresh` and ends with the call.
    constructor {to callback} {
        foreach key {host port payload reader resend retries connect_ms} {set $key [dict get $to $key]}
        foreach {key otherwise} {stays 0 owns ""} {
            set $key [expr {[dict exists $to $key] ? [dict get $to $key] : $otherwise}]
        }
        set done $callback
        set chan ""
        set attempts 0
        set deadline_timer [after [dict get $to timeout_ms] [namespace code [list my DeadlinePassed]]]
        # Not from here: the callback must not come before the caller has the object.
        set step_timer [after 0 [namespace code {my Attempt}]]
    }

    destructor {
        after cancel $deadline_timer
        my Drop
        if {$owns ne ""} {$owns destroy}
    }

    method host {} {return $host}

    # Ends the call with an error of the caller's choice.
    method fail {errorcode message} {my Finish [list error $errorcode $message]}

    method Attempt {} {
        incr attempts
        set sent 0
        set received ""
        if {$owns ne ""} {$owns fresh}
        if {[catch {socket -async $host $port} result options]} {
            # Not a POSIX error when the name could not be looked up.
            set code [dict get $options -errorcode]
            set posix [expr {[lindex $code 0] eq "POSIX" ? [lindex $code 1] : "LOOKUP"}]
            my AttemptFailed $posix [regsub {^couldn't open socket: } $result {}]
            return
        }
        set chan $result
        chan configure $chan -blocking 0 -translation binary -buffering full -buffersize 65536
        catch {chan configure $chan -keepalive 1}  ;# Tcl 8.7 and later can notice a dead peer
        chan event $chan writable [namespace code {my Connected}]
        set step_timer [after $connect_ms [namespace code {my AttemptFailed ETIMEDOUT "no connection in time"}]]
    }

    method Connected {} {
        after cancel $step_timer
        chan event $chan writable {}
        set trouble [chan configure $chan -error]
        if {$trouble ne ""} {
            my AttemptFailed [my PosixName $trouble] $trouble
            return
        }
        chan event $chan readable [namespace code {my Readable}]
        set sent 1
        # A failure to write shows when the answer is read.
        catch {puts -nonewline $chan $payload; flush $chan}
    }

    method Readable {} {
        if {[catch {chan read $chan} bytes options]} {
            lassign [dict get $options -errorcode] - posix words
            my AttemptFailed $posix $words
            return
        }
        append received $bytes
        set me [self]
        set failed [catch {{*}$reader $received} answer options]
        if {![info object isa object $me]} return  ;# the reader told somebody, who gave this up
        if {$failed} {
            my fail [dict get $options -errorcode] $answer
        } elseif {[llength $answer]} {
            my Finish [my Answered [lindex $answer 0]]
        } elseif {[chan eof $chan]} {
            my AttemptFailed ECONNRESET "the connection was closed before the answer was complete"
        }
    }

    method AttemptFailed {posix words} {
        my Drop
        set is_safe [expr {$resend eq "always" || $received eq "" && ($resend || !$sent)}]
        if {$is_safe && $posix in $::compute_broker::retried_errors && $attempts <= $retries} {
            set step_timer [after [my RetryPauseMs] [namespace code {my Attempt}]]
            return
        }
        my fail [list COMPUTE_BROKER CONNECTION $posix] "$host:$port: $words"
    }

    method Answered {answer} {
        if {!$stays} {return [list ok $answer]}
        chan event $chan readable {}
        set left_open $chan
        set chan ""
        return [list ok $answer $left_open $received]
    }

    method RetryPauseMs {} {
        set pause_ms [expr {$::compute_broker::retry_pause_ms_first << min($attempts - 1, 10)}]
        return [expr {min($pause_ms, $::compute_broker::retry_pause_ms_max)}]
    }

    method DeadlinePassed {} {
        set what [expr {$sent ? "no answer" : "no connection"}]
        my fail {COMPUTE_BROKER TIMEOUT} "$host:$port: $what in time"
    }

    method PosixName {words} {
        if {[dict exists $::compute_broker::posix_names $words]} {
            return [dict get $::compute_broker::posix_names $words]
        }
        return UNKNOWN
    }

    method Drop {} {
        after cancel $step_timer
        if {$chan ne ""} {
            catch {close $chan}
            set chan ""
        }
    }

    method Finish {outcome} {
        set callback $done
        my destroy
        uplevel #0 [list {*}$callback $outcome]
    }
}
