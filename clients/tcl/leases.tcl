# Leases: acquire, renew, done, watch.
#
# A lease with -hold connection lives as long as its connection, which stays open here: when this process ends, however
# it ends, the broker gives the worker to the next. RENEW goes over that connection now and then, which tells whether
# the lease still lives and keeps gateways from forgetting the connection. When it breaks, RENEW goes on over new ones:
# a broker that was started again knows its leases, but not the connection.
#
# An ACQUIRE whose answer was lost is sent again only when its leases end with the connection: the broken one ended
# them. Without that, a second one could acquire twice.

namespace eval ::compute_broker {
    namespace export acquire cancel renew done watch unwatch

    # What a value must be, beside what protocol.tcl knows.
    lappend kinds \
        count {is_whole $value 1 1000}          {a whole number from 1 to 1000} \
        ttl   {is_whole $value 1 86400}         {a whole number of seconds from 1 to 86400} \
        hold  {expr {$value eq "connection"}}   {connection} \
        lease {regexp {^[A-Za-z0-9._:-]{1,255}$} $value} {a lease, as acquire returned it,}

    variable watch_again_ms 1000  ;# after a watch's connection has ended; a broker restarts within seconds
    variable held                 ;# connection -> dict: ids asked rest timer on_lost
    variable renewals             ;# lease -> dict: timer call on_lost, since its connection broke
    variable watches              ;# watch -> dict: command client chan call timer rest
    array set held {}
    array set renewals {}
    array set watches {}
}

# New leases of ready workers. Options: those of get_worker, -count -min -ttl -hold connection as the broker's ACQUIRE,
# and three command prefixes: -on_pending gets a dict (eta position code reason) for each PENDING line while it waits,
# and what it raises gives up the request; -on_lost gets a lease that was held by its connection and has ended; with
# -command acquire returns at once, something for cancel, and the prefix gets "ok <result>" or
# "error <message> <errorcode>" at the end. The result is a dict (id ip port pool type cores market price expires;
# type, cores and price are empty when unknown), with -count a list of them.
proc ::compute_broker::acquire {args} {
    set given [options {-pool "" -cores "" -type "" -region "" -wait "" -exclusive "" -client "" -timeout "" -count ""
        -min "" -ttl "" -hold "" -command "" -on_pending "" -on_lost ""} $args]
    set call_of [acquire_call $given]
    set command [dict get $given -command]
    if {$command ne ""} {return [call_start $call_of [list ::compute_broker::acquire_told $given $command]]}
    return [acquired $given [wait_for $call_of]]
}

# Gives up an acquire that was started with -command, silently. One that has ended already is no error.
proc ::compute_broker::cancel {call} {
    if {[info object isa object $call]} {$call destroy}
    return
}

# OK: the lease lasts its ttl again. An ended one is an error with DENIED LEASE_ENDED.
proc ::compute_broker::renew {lease args} {
    set given [options {-timeout ""} $args]
    return [expect_ok [ask "RENEW [check lease lease $lease]" [dict get $given -timeout]]]
}

# OK: the lease is given back, and its worker stays warm. An ended one is an error with DENIED LEASE_ENDED.
proc ::compute_broker::done {lease args} {
    set given [options {-timeout ""} $args]
    set line "DONE [check lease lease $lease]"
    set chan [chan_of $lease]
    renewal_end $lease
    if {$chan ne ""} {dict set ::compute_broker::held($chan) ids [ids_without $chan $lease]}
    try {
        return [expect_ok [ask $line [dict get $given -timeout]]]
    } finally {
        # Closing it also ends a lease whose DONE was not heard, once no other is tied to it.
        if {[info exists ::compute_broker::held($chan)] && [dict get $::compute_broker::held($chan) ids] eq ""} {
            held_close $chan
        }
    }
}

# Calls -command with a dict (what ip lease in replacement reason) whenever a worker that this client holds is about
# to go or has gone, until unwatch. Returns what unwatch takes. A broker that restarts is found again; what happens
# meanwhile is not told.
proc ::compute_broker::watch {args} {
    variable watches
    variable serial
    set given [options {-command "" -client ""} $args]
    if {[dict get $given -command] eq ""} {bad "watch needs a -command"}
    client_name [dict get $given -client]
    set watch watch[incr serial]
    set watches($watch) [dict create command [dict get $given -command] client [dict get $given -client] \
        chan "" call "" timer "" rest ""]
    watch_start $watch
    return $watch
}

proc ::compute_broker::unwatch {watch} {
    variable watches
    if {![info exists watches($watch)]} return
    set chan [dict get $watches($watch) chan]
    after cancel [dict get $watches($watch) timer]
    cancel [dict get $watches($watch) call]
    unset watches($watch)
    if {$chan ne ""} {close $chan}
    return
}

# ---------------------------------------------------------------- acquire

proc ::compute_broker::acquire_call {given} {
    variable get_worker_wait_s
    variable get_worker_margin_s
    dict with given {}
    set wait_s [expr {${-wait} eq "" ? $get_worker_wait_s : [check wait -wait ${-wait}]}]
    if {${-timeout} eq ""} {set -timeout [expr {$wait_s + $get_worker_margin_s}]}
    set is_held [expr {${-hold} ne ""}]
    set call_of [broker_call [acquire_line $given] ${-timeout} [expr {$is_held ? "always" : 0}]]
    set reader [LeaseReader new ${-on_pending} [expr {${-count} eq "" ? 1 : ${-count}}]]
    return [dict merge $call_of [dict create reader [list $reader read] owns $reader stays $is_held]]
}

proc ::compute_broker::acquire_line {given} {
    set line ACQUIRE
    foreach {name kind} {-count count -min count -hold hold -ttl ttl} {
        set value [dict get $given $name]
        if {$value ne ""} {append line " [string range $name 1 end]=[check $kind $name $value]"}
    }
    return $line[string range [get_worker_line $given] [string length GET_WORKER] end]
}

proc ::compute_broker::acquire_told {given command outcome} {
    if {[catch {acquired $given $outcome} result how]} {
        uplevel #0 [list {*}$command error $result [dict get $how -errorcode]]
    } else {
        uplevel #0 [list {*}$command ok $result]
    }
}

# The result of an acquire, or its error. What is tied to its connection is looked after from here on.
proc ::compute_broker::acquired {given outcome} {
    set leases [answer_of $outcome]
    lassign $outcome - - chan
    if {$chan ne ""} {held_start $chan [lmap lease $leases {dict get $lease id}] [dict get $given -on_lost]}
    return [expr {[dict get $given -count] eq "" ? [lindex $leases 0] : $leases}]
}

# Reads the answer of one ACQUIRE, for Call: all bytes so far -> {} or a list with the leases. What PENDING says is told
# as it comes, once.
oo::class create ::compute_broker::LeaseReader {
    variable on_pending count read_end leases

    constructor {command count_wanted} {
        set on_pending $command
        set count $count_wanted
        my fresh
    }

    # Another attempt begins.
    method fresh {} {
        set read_end 0
        set leases {}
    }

    method read {bytes} {
        while {[set end [string first \n $bytes $read_end]] >= 0} {
            set line [string trimright [string range $bytes $read_end $end-1] \r]
            set read_end [expr {$end + 1}]
            if {[my Take $line]} {return [list $leases]}
            if {![info object isa object [self]]} return
        }
        return
    }

    # Whether this line completes the answer.
    method Take {line} {
        switch -glob -- $line {
            {PENDING *} {
                set pending [::compute_broker::pending_of $line]
                if {$on_pending ne ""} {uplevel #0 [list {*}$on_pending $pending]}
                return 0
            }
            {LEASE *} {
                lassign [::compute_broker::lease_of $line] lease of
                lappend leases $lease
                if {$of > $count} {::compute_broker::nonsense $line "more than were asked for"}
                return [expr {[llength $leases] >= $of}]
            }
        }
        ::compute_broker::nonsense [::compute_broker::reply_of $line] "leases were expected"
    }
}

# ---------------------------------------------------------------- lines

# A LEASE line -> {dict of}.
proc ::compute_broker::lease_of {line} {
    set said [pairs_of $line {id ip port pool type cores market price expires of}]
    dict with said {}
    if {!([is_kind lease $id] && [is_address $ip] && [is_kind port $port] && [is_kind count $of])} {
        nonsense $line "that is no lease"
    }
    dict unset said of
    foreach key {type cores price} {
        if {[dict get $said $key] eq "-"} {dict set said $key ""}
    }
    return [list $said $of]
}

# A PENDING line -> a dict; eta is in seconds, empty when nobody knows.
proc ::compute_broker::pending_of {line} {
    set said [pairs_of $line {eta position code}]
    if {[dict get $said eta] eq "unknown"} {dict set said eta ""}
    return $said
}

# A NOTICE line -> a dict; ip and replacement are empty when there is none.
proc ::compute_broker::notice_of {line} {
    if {![regexp {^NOTICE ([a-z_]+) (.*)$} $line -> what rest]} {nonsense $line "that is no notice"}
    set said [pairs_of "NOTICE $rest" {ip lease in replacement}]
    foreach key {ip replacement} {
        if {[dict get $said $key] eq "-"} {dict set said $key ""}
    }
    return [dict merge [dict create what $what] $said]
}

# The wanted keys of a line and its reason, which runs to the end. Other keys are a newer broker's.
proc ::compute_broker::pairs_of {line wanted} {
    set reason ""
    regexp {^(.*?) reason=(.*)$} $line -> line reason
    foreach word [lrange [split $line] 1 end] {
        if {[regexp {^([^=]+)=(.*)$} $word -> key value]} {set said($key) $value}
    }
    foreach key $wanted {
        if {![info exists said($key)]} {nonsense $line "it has no $key="}
        dict set result $key $said($key)
    }
    if {"code" in $wanted || "replacement" in $wanted} {dict set result reason $reason}
    return $result
}

proc ::compute_broker::is_kind {kind value} {
    return [expr {![catch {check $kind value $value}]}]
}

proc ::compute_broker::nonsense {line why} {
    throw {COMPUTE_BROKER PROTOCOL} "the broker answered \"[string range $line 0 79]\": $why"
}

# ---------------------------------------------------------------- leases that live as long as a connection

proc ::compute_broker::held_start {chan ids on_lost} {
    variable held
    set held($chan) [dict create ids $ids asked {} rest "" timer "" on_lost $on_lost]
    chan event $chan readable [list ::compute_broker::held_readable $chan]
    held_schedule $chan
}

proc ::compute_broker::held_schedule {chan} {
    variable held
    variable settings
    dict set held($chan) timer \
        [after [milliseconds_of -keep_alive [dict get $settings -keep_alive]] [list ::compute_broker::held_renew $chan]]
}

# Answers come in the order of the questions. While one is missing no more are asked: they would pile up.
proc ::compute_broker::held_renew {chan} {
    variable held
    if {[dict get $held($chan) asked] eq ""} {
        foreach id [dict get $held($chan) ids] {
            dict lappend held($chan) asked $id
            catch {puts -nonewline $chan "RENEW $id\n"}
        }
        catch {flush $chan}  ;# a failure to write shows when the answer is read
    }
    held_schedule $chan
}

proc ::compute_broker::held_readable {chan} {
    variable held
    set is_broken [catch {chan read $chan} bytes]
    if {!$is_broken} {
        dict append held($chan) rest $bytes
        foreach line [lines_of held($chan)] {
            set answered [lindex [dict get $held($chan) asked] 0]
            dict set held($chan) asked [lrange [dict get $held($chan) asked] 1 end]
            if {[is_ended $line]} {held_lost $chan $answered}
            if {![info exists held($chan)]} return
        }
        set is_broken [chan eof $chan]
    }
    if {$is_broken} {held_broken $chan}
}

proc ::compute_broker::held_lost {chan id} {
    variable held
    if {$id ni [dict get $held($chan) ids]} return  ;# given back meanwhile
    set on_lost [dict get $held($chan) on_lost]
    dict set held($chan) ids [ids_without $chan $id]
    if {[dict get $held($chan) ids] eq ""} {held_close $chan}
    tell_lost $id $on_lost
}

proc ::compute_broker::held_broken {chan} {
    variable held
    variable renewals
    set ids [dict get $held($chan) ids]
    set on_lost [dict get $held($chan) on_lost]
    held_close $chan
    foreach id $ids {
        set renewals($id) [dict create timer "" call "" on_lost $on_lost]
        renewal_ask $id
    }
}

proc ::compute_broker::held_close {chan} {
    variable held
    after cancel [dict get $held($chan) timer]
    unset held($chan)
    catch {close $chan}
}

proc ::compute_broker::chan_of {id} {
    variable held
    foreach {chan kept} [array get held] {
        if {$id in [dict get $kept ids]} {return $chan}
    }
    return ""
}

proc ::compute_broker::ids_without {chan id} {
    variable held
    return [lsearch -all -inline -not -exact [dict get $held($chan) ids] $id]
}

proc ::compute_broker::tell_lost {id on_lost} {
    note "the lease $id has ended"
    if {$on_lost ne ""} {uplevel #0 [list {*}$on_lost $id]}
}

# Whether a reply says that the lease has ended: DENIED alone is also what a broker says that is read-only.
proc ::compute_broker::is_ended {line} {
    return [expr {[catch {reply_of $line} - how] && [dict get $how -errorcode] eq {COMPUTE_BROKER DENIED LEASE_ENDED}}]
}

# The whole lines in the `rest` of the dict in a variable, which keeps what has no end yet.
proc ::compute_broker::lines_of {name} {
    variable reply_bytes_max
    upvar 0 ::compute_broker::$name state
    set lines [split [dict get $state rest] \n]
    dict set state rest [string range [lindex $lines end] 0 $reply_bytes_max]
    return [lmap line [lrange $lines 0 end-1] {string trimright $line \r}]
}

# ---------------------------------------------------------------- leases whose connection broke

proc ::compute_broker::renewal_ask {id} {
    variable renewals
    dict set renewals($id) call [call_start [broker_call "RENEW $id" "" 1] [list ::compute_broker::renewal_told $id]]
}

proc ::compute_broker::renewal_told {id outcome} {
    variable renewals
    variable settings
    if {![info exists renewals($id)]} return
    dict set renewals($id) call ""
    lassign $outcome how reply
    if {$how eq "ok" && [is_ended $reply]} {
        set on_lost [dict get $renewals($id) on_lost]
        renewal_end $id
        tell_lost $id $on_lost
        return
    }
    dict set renewals($id) timer \
        [after [milliseconds_of -keep_alive [dict get $settings -keep_alive]] [list ::compute_broker::renewal_ask $id]]
}

proc ::compute_broker::renewal_end {id} {
    variable renewals
    if {![info exists renewals($id)]} return
    after cancel [dict get $renewals($id) timer]
    cancel [dict get $renewals($id) call]
    unset renewals($id)
}

# ---------------------------------------------------------------- watching

proc ::compute_broker::watch_start {watch} {
    variable watches
    set line "WATCH client=[client_name [dict get $watches($watch) client]]"
    dict set watches($watch) call [call_start [dict merge [broker_call $line "" 1] {stays 1}] \
        [list ::compute_broker::watch_told $watch]]
}

proc ::compute_broker::watch_told {watch outcome} {
    variable watches
    dict set watches($watch) call ""
    lassign $outcome - - chan received
    if {[catch {expect_ok [reply_of [answer_of $outcome]]} trouble how]} {
        note "watch: $trouble"
        if {[lindex $outcome 0] eq "ok"} {catch {close $chan}}
        if {[lindex [dict get $how -errorcode] 1] in {CONNECTION TIMEOUT DRAINING}} {
            watch_again $watch
        } else {
            unwatch $watch
        }
        return
    }
    dict set watches($watch) chan $chan
    dict set watches($watch) rest [string range $received [string first \n $received]+1 end]
    chan event $chan readable [list ::compute_broker::watch_readable $watch]
    watch_tell $watch
}

proc ::compute_broker::watch_again {watch} {
    variable watches
    variable watch_again_ms
    dict set watches($watch) timer [after $watch_again_ms [list ::compute_broker::watch_start $watch]]
}

proc ::compute_broker::watch_readable {watch} {
    variable watches
    set chan [dict get $watches($watch) chan]
    set is_broken [catch {chan read $chan} bytes]
    if {!$is_broken} {
        dict append watches($watch) rest $bytes
        watch_tell $watch
        if {![info exists watches($watch)]} return  ;# its own command ended it
        set is_broken [chan eof $chan]
    }
    if {$is_broken} {
        catch {close $chan}
        dict set watches($watch) chan ""
        watch_again $watch
    }
}

proc ::compute_broker::watch_tell {watch} {
    variable watches
    foreach line [lines_of watches($watch)] {
        if {![info exists watches($watch)]} return
        if {[catch {notice_of $line} notice]} {
            note "watch: $notice"
            continue
        }
        uplevel #0 [list {*}[dict get $watches($watch) command] $notice]
    }
}
