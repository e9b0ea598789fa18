# Plays the client's part in dialogues about leases with the Tcl package. On stdin `<voice> <command>` a line, for as
# many voices as there are; on stdout `<voice> <line>`, each put back into the line that the broker sent.

package require compute_broker

proc say {voice line} {
    puts "$voice $line"
    flush stdout
}

proc error_line {message how} {
    set code [lindex $how 1]
    if {$code in {UNKNOWN_COMMAND WORKER_NOT_FOUND ERROR}} {return "ERROR: $message"}
    return "ERROR: $message \[$code\]"
}

proc or_unknown {value} {
    return [expr {$value eq "" ? "-" : $value}]
}

proc pending {voice said} {
    dict with said {}
    say $voice "PENDING eta=[expr {$eta eq "" ? "unknown" : $eta}] position=$position code=$code reason=$reason"
}

proc acquired {voice how result args} {
    if {$how eq "error"} {
        say $voice [error_line $result [lindex $args 0]]
        return
    }
    foreach lease $result {
        dict with lease {}
        set ::held($voice) $id
        say $voice "LEASE id=$id ip=$ip port=$port pool=$pool type=[or_unknown $type] cores=[or_unknown $cores]\
            market=$market price=[or_unknown $price] expires=$expires of=[llength $result]"
    }
}

proc noticed {voice said} {
    dict with said {}
    set tail [expr {$reason eq "" ? "" : " reason=$reason"}]
    say $voice "NOTICE $what ip=[or_unknown $ip] lease=$lease in=$in replacement=[or_unknown $replacement]$tail"
}

# Nothing tells when a watch has begun; a dialogue goes on only then.
proc watching {voice watch} {
    if {[dict get $::compute_broker::watches($watch) chan] eq ""} {
        after 5 [list watching $voice $watch]
    } else {
        say $voice OK
    }
}

proc options_of {words} {
    return [concat {*}[lmap word $words {
        set at [string first = $word]
        list -[string range $word 0 $at-1] [string range $word $at+1 end]
    }]]
}

proc play {voice command} {
    set rest [lassign $command verb]
    switch -- $verb {
        ACQUIRE {
            set options [dict merge {-count 1} [options_of $rest]]
            compute_broker acquire {*}$options -on_pending [list pending $voice] -command [list acquired $voice]
        }
        WATCH {
            watching $voice [compute_broker watch {*}[options_of $rest] -command [list noticed $voice]]
        }
        RENEW - DONE {say $voice [compute_broker [string tolower $verb] {*}$rest]}
        VANISH {::compute_broker::held_close [::compute_broker::chan_of $::held($voice)]}
        default {say $voice [compute_broker::request $command]}
    }
}

proc hear {} {
    if {[gets stdin line] < 0} {
        if {[eof stdin]} exit
        return
    }
    regexp {^(\d+) (.*)$} $line -> voice command
    if {[catch {play $voice $command} message how]} {say $voice [error_line $message [dict get $how -errorcode]]}
}

compute_broker configure -log "" -retries 0
chan configure stdin -blocking 0
chan event stdin readable hear
vwait forever
